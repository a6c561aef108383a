// CLIP's byte-pair tokenizer, by the rules of ldm/tokenizer.py.
//
//   new Tokenizer(vocab, merges, words).encode(text) -> ids, without start, end and filling

const SPECIAL = ["<|startoftext|>", "<|endoftext|>"];
const WORDS =
  /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+/gu;
const PIECES = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+/gu;

// A letter for each byte: those that print stand for themselves, the others from 256 on.
const LETTERS = (() => {
  const prints = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCodePoint(prints(b) ? b : next++));
})();

export class Tokenizer {
  // `words`: all that the model was trained on, or null where nobody knows.
  constructor(vocab, merges, words = null) {
    this.vocab = vocab;
    this.ranks = new Map(merges.map(([first, second], i) => [`${first} ${second}`, i]));
    this.words = words && new Set(words);
  }

  encode(text) {
    const parts = text.split(/(<\|startoftext\|>|<\|endoftext\|>)/);
    return parts.flatMap((part) =>
      SPECIAL.includes(part) ? [this.vocab[part]] : split(part).flatMap((word) => this.ids(word)),
    );
  }

  // Start token, as many ids as fit, end token, and end tokens up to the length.
  pad(ids, length) {
    const [start, end] = SPECIAL.map((token) => this.vocab[token]);
    const kept = [start, ...ids.slice(0, length - 2)];
    return [...kept, ...Array(length - kept.length).fill(end)];
  }

  // The words that the model has never seen, each once.
  unseen(text) {
    if (!this.words) return [];
    const words = split(text).flatMap((word) => word.match(PIECES));
    const spelled = words.filter((word) => /^\p{L}+$/u.test(word));
    return [...new Set(spelled)].filter((word) => !this.words.has(word));
  }

  ids(word) {
    return word.match(PIECES).flatMap((piece) => {
      const letters = [...new TextEncoder().encode(piece)].map((byte) => LETTERS[byte]);
      letters[letters.length - 1] += "</w>";
      return this.merged(letters).map((token) => this.vocab[token]);
    });
  }

  // The best pair of neighbours becomes one token, until no pair is known.
  merged(tokens) {
    for (;;) {
      let best = Infinity, place = -1;
      for (let i = 0; i + 1 < tokens.length; i++) {
        const rank = this.ranks.get(`${tokens[i]} ${tokens[i + 1]}`) ?? Infinity;
        if (rank < best) [best, place] = [rank, i];
      }
      if (place < 0) return tokens;
      tokens.splice(place, 2, tokens[place] + tokens[place + 1]);
    }
  }
}

// Cleaned and split. Letter by letter: at a word's end JavaScript has another small sigma.
function split(text) {
  const clean = [...text.normalize("NFC").replace(/\s+/g, " ")].map((c) => c.toLowerCase());
  return clean.join("").match(WORDS) ?? [];
}
