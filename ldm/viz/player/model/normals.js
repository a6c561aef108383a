// torch's normal numbers on a CPU, from a seed: a picture's starting noise is the same as in Python.
//
//   new Normals(seed).draw(count) -> Float32Array, as torch.randn(count, generator=seeded) gives
//
// torch draws 32-bit integers by the Mersenne Twister mt19937 (Matsumoto & Nishimura 1998), and makes
// pairs of normals of pairs of uniform numbers (Box & Muller 1958). From 16 numbers on it does so 16
// at a time, with uniform numbers of 24 bits; fewer it draws pair by pair, with 53 bits.

export class Normals {
  constructor(seed) {
    // torch keeps the low 32 bits of a seed for its Twister.
    const state = (this.state = new Uint32Array(624));
    state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
    for (let i = 1; i < 624; i++) {
      const before = state[i - 1] ^ (state[i - 1] >>> 30);
      state[i] = Math.imul(1812433253, before) + i;
    }
    this.place = 624;
    this.spare = null; // the second normal of a pair that was drawn alone
  }

  integer() {
    if (this.place === 624) this.twist();
    let y = this.state[this.place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  twist() {
    const s = this.state;
    for (let i = 0; i < 624; i++) {
      const y = (s[i] & 0x80000000) | (s[(i + 1) % 624] & 0x7fffffff);
      s[i] = s[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.place = 0;
  }

  // In [0, 1): of 24 bits, as floats are; and of 53, as doubles are, the first integer the high one.
  float() {
    return (this.integer() & 0xffffff) / 2 ** 24;
  }

  double() {
    const high = this.integer(), low = this.integer();
    return ((high & 0x1fffff) * 2 ** 32 + low) / 2 ** 53;
  }

  draw(count) {
    const normals = new Float32Array(count);
    if (count < 16) return normals.map(() => this.one());
    for (let i = 0; i < count; i++) normals[i] = this.float();
    for (let i = 0; i + 16 <= count; i += 16) pairUp(normals, i);
    if (count % 16) {
      // The last 16 are drawn once more, over what was there.
      for (let i = count - 16; i < count; i++) normals[i] = this.float();
      pairUp(normals, count - 16);
    }
    return normals;
  }

  one() {
    if (this.spare !== null) {
      const spare = this.spare;
      this.spare = null;
      return spare;
    }
    const angle = 2 * Math.PI * this.double();
    const radius = Math.sqrt(-2 * Math.log1p(-this.double()));
    this.spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }
}

// Numbers 0 to 7 give the radii of eight pairs, 8 to 15 their angles.
function pairUp(numbers, start) {
  for (let i = start; i < start + 8; i++) {
    const radius = Math.fround(Math.sqrt(-2 * Math.log(1 - numbers[i])));
    const angle = Math.fround(2 * Math.PI * numbers[i + 8]);
    numbers[i] = radius * Math.cos(angle);
    numbers[i + 8] = radius * Math.sin(angle);
  }
}
