// A map is {rows, columns, values}: what share of each place's attention goes to the word.
// Frame `run.frames.length` is the mean over all steps.

function storedMap(run, size, frame, word) {
  const maps = run.attention[size];
  const cells = maps.rows * maps.columns;
  const which = frame * run.words.length + word;
  const values = new Float32Array(cells);
  const unit = maps.peaks[which] / 255;
  for (let i = 0; i < cells; i++) values[i] = unit * maps.levels[which * cells + i];
  return { rows: maps.rows, columns: maps.columns, values };
}

// All sizes, brought to the latents' size and averaged over the layers, as DAAM sums them.
function allSizes(run, frame, word) {
  const [rows, columns] = run.latent_size;
  const values = new Float32Array(rows * columns);
  let layers = 0;
  run.attention.forEach((maps, size) => {
    const finer = resized(storedMap(run, size, frame, word), rows, columns);
    for (let i = 0; i < values.length; i++) values[i] += maps.layers * finer[i];
    layers += maps.layers;
  });
  return { rows, columns, values: values.map((value) => value / layers) };
}

// Bilinear, with the centres of the cells as the points.
function resized(map, rows, columns) {
  const values = new Float32Array(rows * columns);
  const place = (i, to, from) => Math.min(from - 1, Math.max(0, ((i + 0.5) * from) / to - 0.5));
  for (let r = 0; r < rows; r++) {
    const y = place(r, rows, map.rows), y0 = Math.floor(y), y1 = Math.min(y0 + 1, map.rows - 1);
    for (let c = 0; c < columns; c++) {
      const x = place(c, columns, map.columns), x0 = Math.floor(x);
      const x1 = Math.min(x0 + 1, map.columns - 1);
      const at = (row, column) => map.values[row * map.columns + column];
      const top = at(y0, x0) * (1 - x + x0) + at(y0, x1) * (x - x0);
      const bottom = at(y1, x0) * (1 - x + x0) + at(y1, x1) * (x - x0);
      values[r * columns + c] = top * (1 - y + y0) + bottom * (y - y0);
    }
  }
  return values;
}

function wordMap(run, frame, word) {
  const shown = state.when === "average" ? run.frames.length : frame;
  return state.where === "all"
    ? allSizes(run, shown, word)
    : storedMap(run, Number(state.where), shown, word);
}

// Below this many times its mean, a map's peak is no place to point at: stretched to its own peak the
// map would glow like a find. The pictures of ldm.viz.attention have the same.
const FLAT = 1.5;
const isFlat = (map) => peakOf(map) < FLAT * meanOf(map);

const peakOf = (map) => map.values.reduce((most, value) => Math.max(most, value), 0);
const meanOf = (map) => map.values.reduce((sum, value) => sum + value, 0) / map.values.length;

// The largest share that any word of the prompt has: the start and the end token, which get most
// of all attention, would leave the words in the dark.
function sharedPeak(run, frame) {
  let most = 0;
  run.words.forEach((word, i) => {
    if (word.kind === "word") most = Math.max(most, peakOf(wordMap(run, frame, i)));
  });
  return most;
}
