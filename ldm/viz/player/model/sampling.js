// The way from noise to a picture: the grid of DDIM, what a prediction says, and DDIM's step, by the
// equations of ldm/schedule.py and ldm/samplers/rules.py. Latents are Float32Array.

// Python's round: halves go to the even number.
function rounded(value) {
  const below = Math.floor(value), rest = value - below;
  return rest < 0.5 || (rest === 0.5 && below % 2 === 0) ? below : below + 1;
}

// [[t, t_prev], ...], noisiest first; the last step ends at timestep 0.
export function ddimTimesteps(steps, alphaBar) {
  const total = alphaBar.length, offset = steps === total ? 0 : 1;
  const even = Array.from({ length: steps }, (_, i) => {
    return (steps - 1 - i) * Math.floor(total / steps) + offset;
  });
  const trailing = Array.from({ length: steps }, (_, i) => rounded((total * (steps - i)) / steps) - 1);
  const endsInNoise = alphaBar[total - 1] === 0;
  const official = !endsInNoise && (steps <= 10 || 10 * even[0] >= 9 * total);
  const grid = official ? even : trailing;
  return grid.map((t, i) => [t, i + 1 < grid.length ? grid[i + 1] : 0]);
}

// (x0, eps), from what a model says of x: "eps", "v", "x0" or "flow".
export function pairFrom(prediction, output, x, alphaBar) {
  const a = Math.sqrt(alphaBar), b = Math.sqrt(1 - alphaBar);
  const of = (rule) => output.map((value, i) => rule(value, x[i]));
  if (prediction === "eps") return { x0: of((eps, xt) => (xt - b * eps) / a), eps: output };
  if (prediction === "v") {
    return { x0: of((v, xt) => a * xt - b * v), eps: of((v, xt) => b * xt + a * v) };
  }
  if (prediction === "x0") return { x0: output, eps: of((x0, xt) => (xt - a * x0) / b) };
  return {
    x0: of((flow, xt) => (xt - b * flow) / (a + b)),
    eps: of((flow, xt) => (xt + a * flow) / (a + b)),
  };
}

export function guided(cond, uncond, scale) {
  return uncond.map((value, i) => value + scale * (cond[i] - value));
}

// DDIM eq. 12, without noise: back to x0, and from there along eps.
export function ddimStep({ x0, eps }, alphaBarPrev) {
  const a = Math.sqrt(alphaBarPrev), b = Math.sqrt(1 - alphaBarPrev);
  return x0.map((value, i) => a * value + b * eps[i]);
}
