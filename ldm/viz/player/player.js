"use strict";

// Shows what is in the page's data: one run or two, at one position of the timeline at a time.
// `state` is all that changes; `draw` shows it; everything else either makes the elements once or
// changes `state` and calls `draw`.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs.map(readRun);
const byId = (id) => document.getElementById(id);
const LETTERS = ["A", "B"];

const state = {
  position: 0,      // of the slider
  playing: false,
  pinned: null,     // {run, word}: pressed, stays
  pointed: null,    // {run, word}: under the pointer or focused, goes
  when: "step",     // or "average"
  where: "all",     // or the place of one size among a run's attention maps
  scale: "own",     // or "shared"
};

// --- Reading the data -----------------------------------------------------------------------

function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

function readRun(run) {
  const pictures = (uris) => uris.map((uri) => Object.assign(new Image(), { src: uri }));
  return {
    ...run,
    x: pictures(run.x),
    x0: pictures(run.x0),
    guidance: run.guidance && { ...run.guidance, levels: bytes(run.guidance.levels) },
    attention: run.attention.map((maps) => ({
      ...maps,
      levels: bytes(maps.levels),
      peaks: new Float32Array(bytes(maps.peaks).buffer),
    })),
  };
}

// --- Attention ------------------------------------------------------------------------------

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

// The same word of another run: the same text, the same kind, the same one of several.
function counterpart(from, word, to) {
  if (from === to) return word;
  const same = (one) => one.text === from.words[word].text && one.kind === from.words[word].kind;
  const places = (run) => run.words.flatMap((one, i) => (same(one) ? [i] : []));
  const found = places(to)[places(from).indexOf(word)];
  return found === undefined ? null : found;
}

const chosen = () => state.pointed || state.pinned;

// --- Drawing --------------------------------------------------------------------------------

const RAMP = [[21, 18, 43], [75, 42, 148], [192, 64, 127], [249, 138, 76], [255, 240, 181]];

function colour(value) {
  const x = Math.min(1, Math.max(0, value)) * (RAMP.length - 1);
  const i = Math.min(RAMP.length - 2, Math.floor(x));
  return RAMP[i].map((low, c) => low + (RAMP[i + 1][c] - low) * (x - i));
}

function heat(map, peak, alpha) {
  const canvas = document.createElement("canvas");
  canvas.width = map.columns;
  canvas.height = map.rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(map.columns, map.rows);
  map.values.forEach((value, i) => {
    const share = peak > 0 ? value / peak : 0;
    pixels.data.set([...colour(share), 255 * alpha(share)], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

// A picture that the browser has not read yet is drawn as soon as it has been.
function paint(canvas, picture, overlay) {
  if (!picture.complete || !picture.naturalWidth) {
    picture.addEventListener("load", draw, { once: true });
    return;
  }
  const width = picture.naturalWidth, height = picture.naturalHeight;
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  canvas.classList.toggle("coarse", width < 256);
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  if (!overlay) return;
  context.fillStyle = "rgb(12 10 26 / 0.35)";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingEnabled = state.where === "all";
  context.drawImage(overlay, 0, 0, width, height);
}

function draw() {
  const frames = data.timeline[state.position];
  const looking = [];
  runs.forEach((run, i) => {
    const frame = frames[i], at = run.frames[frame], elements = run.elements;
    const word = chosen() && counterpart(runs[chosen().run], chosen().word, run);
    let overlay = null;
    if (chosen() && word !== null) {
      const map = wordMap(run, frame, word);
      const peak = state.scale === "own" ? peakOf(map) : sharedPeak(run, frame);
      overlay = heat(map, peak, (share) => Math.min(0.88, 1.5 * share));
      looking.push(lookingWords(run, i, word, map, peak));
    } else if (chosen()) {
      looking.push(`Run ${LETTERS[i]} has no such word.`);
    }
    paint(elements.x, run.x[frame]);
    paint(elements.x0, run.x0[frame], overlay);
    const step = `at step ${at.step + 1} of ${run.steps}`;
    label(elements.x, `The noisy latents ${step}, decoded`);
    const laid = overlay ? `, with the attention of ${wordName(run.words[word])} laid over it` : "";
    label(elements.x0, `The guess of the finished picture ${step}${laid}`);
    if (run.guidance) {
      const cells = run.guidance.rows * run.guidance.columns;
      const values = Float32Array.from(
        run.guidance.levels.subarray(frame * cells, (frame + 1) * cells),
      );
      elements.peak.textContent = run.guidance.peaks[frame].toPrecision(2);
      const context = elements.guidance.getContext("2d");
      context.drawImage(heat({ ...run.guidance, values }, 255, () => 1), 0, 0);
      label(elements.guidance, `Where the prompt changes the predicted noise ${step}`);
    }
    run.words.forEach((_, j) => {
      if (!elements.words[j]) return;
      elements.words[j].classList.toggle("shown", Boolean(chosen()) && word === j);
      const pinned = state.pinned && counterpart(runs[state.pinned.run], state.pinned.word, run);
      elements.words[j].setAttribute("aria-pressed", String(Boolean(state.pinned) && pinned === j));
    });
    elements.sentence.textContent = at.sentence;
  });
  const lead = leader(), now = lead.frames[frames[runs.indexOf(lead)]];
  byId("slider").value = state.position;
  const apart = data.apart ? ` The two guesses are ${percent(data.apart[state.position])} apart.` : "";
  byId("apart").textContent = apart;
  byId("slider").setAttribute("aria-valuetext", `Step ${now.step + 1} of ${lead.steps}`);
  byId("where-now").replaceChildren(
    `${now.step + 1} / ${lead.steps}`,
    element("small", { textContent: `t = ${now.t}` }),
  );
  byId("looking").textContent = looking.join(" ") || HINT;
  drawMarkers(frames);
  drawNumbers(frames);
}

const HINT =
  "Point at a word, or tab to it, to lay its attention over the guess of the finished picture. " +
  "Press it to keep it there; Escape lets go.";
const label = (canvas, text) => canvas.setAttribute("aria-label", text);
const percent = (share) => `${Number((100 * share).toPrecision(share > 0.99 ? 3 : 2))}%`;
const leader = () => runs.reduce((a, b) => (b.frames.length > a.frames.length ? b : a));

function wordName(word) {
  const names = { start: "the start of the text", end: "the end of the text" };
  return names[word.kind] || `“${word.text}”`;
}

function lookingWords(run, i, word, map, peak) {
  const who = runs.length > 1 ? `Run ${LETTERS[i]}: ` : "";
  const when = state.when === "average" ? "on average over all steps" : "at this step";
  const name = wordName(run.words[word]);
  const scale = state.scale === "own" ? "" : ` Full brightness is ${percent(peak)}.`;
  return (
    `${who}${name[0].toUpperCase() + name.slice(1)} gets up to ${percent(peakOf(map))} of a ` +
    `place’s attention ${when}; the mean over the picture is ${percent(meanOf(map))}.${scale}`
  );
}

// --- Making the elements, once --------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function tag(i) {
  return element("span", { className: `tag ${LETTERS[i].toLowerCase()}`, textContent: LETTERS[i] });
}

function makeRuns() {
  document.body.className = runs.length > 1 ? "two" : "one";
  runs.forEach((run, i) => {
    const copy = byId("run-template").content.cloneNode(true);
    const title = copy.querySelector(".run-title");
    const section = copy.querySelector(".run");
    title.id = `run-${i}`;
    section.setAttribute("aria-labelledby", title.id);
    if (runs.length > 1) title.append(tag(i), data.headings[i]);
    else Object.assign(title, { className: "hidden", textContent: "The step in pictures" });
    const canvas = (name) => copy.querySelector(`.${name} canvas`);
    run.elements = { x: canvas("x"), x0: canvas("x0"), guidance: canvas("guidance"), words: [] };
    if (run.guidance) {
      run.elements.guidance.width = run.guidance.columns;
      run.elements.guidance.height = run.guidance.rows;
      run.elements.peak = copy.querySelector(".peak");
      copy.querySelector(".absent").remove();
    } else {
      copy.querySelector(".absent").style.aspectRatio = run.latent_size.toReversed().join(" / ");
      for (const name of [".guidance canvas", ".ramp", ".explained"]) {
        copy.querySelector(name).remove();
      }
    }
    run.elements.sentence = element("span");
    const sentence = element("p", { className: "sentence" }, run.elements.sentence);
    if (runs.length > 1) sentence.prepend(tag(i));
    if (i === runs.length - 1) sentence.append(element("span", { id: "apart" }));
    byId("sentences").append(sentence);
    byId("runs").append(copy);
  });
}

function makeWords() {
  const texts = runs.map((run) => JSON.stringify(run.words));
  runs.forEach((run, i) => {
    if (texts.indexOf(texts[i]) < i) return; // one row of words serves both runs
    const group = element("div", { className: "words" });
    group.setAttribute("role", "group");
    const both = texts.length > 1 && texts[0] === texts[1];
    const whose = runs.length > 1 && !both ? `Words of run ${LETTERS[i]}` : "Words of the prompt";
    group.setAttribute("aria-label", whose);
    if (runs.length > 1 && !both) group.append(tag(i));
    run.elements.words = run.words.map((word, j) => {
      const outside = word.kind !== "word";
      const button = element("button", {
        type: "button",
        className: outside ? "word outside" : "word",
        textContent: outside ? `${word.kind} of text` : word.text,
      });
      const point = () => change({ pointed: { run: i, word: j } });
      const leave = () => change({ pointed: null });
      button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && point());
      button.addEventListener("pointerleave", leave);
      button.addEventListener("focus", () => button.matches(":focus-visible") && point());
      button.addEventListener("blur", leave);
      button.addEventListener("click", () => {
        const same = state.pinned && state.pinned.run === i && state.pinned.word === j;
        change({ pinned: same ? null : { run: i, word: j }, pointed: null });
      });
      group.append(button);
      return button;
    });
    byId("words").append(group);
  });
}

function makeOptions() {
  runs[0].attention.forEach((maps, i) => {
    const text = `${maps.label} (${maps.layers} ${maps.layers === 1 ? "layer" : "layers"})`;
    const input = element("input", { type: "radio", name: "where", value: String(i) });
    byId("where").append(element("label", {}, input, element("span", { textContent: text })));
  });
  for (const name of ["when", "where", "scale"]) {
    byId(name).addEventListener("change", (event) => change({ [name]: event.target.value }));
  }
}

// --- Charts: time runs from the noise on the left to the picture on the right --------------------

const charts = [];
const across = (t) => 100 * (1 - t / data.t_max);
const upward = (value, top) => 100 - 92 * (top > 0 ? value / top : 0);
const line = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");

function svg(paths) {
  const space = "http://www.w3.org/2000/svg";
  const made = document.createElementNS(space, "svg");
  made.setAttribute("viewBox", "0 0 100 100");
  made.setAttribute("preserveAspectRatio", "none");
  made.setAttribute("aria-hidden", "true");
  for (const [name, d] of paths) {
    const path = document.createElementNS(space, "path");
    path.setAttribute("class", name);
    path.setAttribute("d", d);
    made.append(path);
  }
  return made;
}

// `value(frame)` may be null: there is no such number at that step.
function makeChart(title, caption, value, top, paths) {
  const rule = element("span", { className: "rule" });
  const dots = runs.map((_, i) => element("span", { className: `dot ${LETTERS[i].toLowerCase()}` }));
  const topmost = element("span", { className: "top", textContent: percent(top) });
  const plot = element("div", { className: "plot" }, svg(paths), topmost, rule, ...dots);
  const seek = (event) => {
    const box = plot.getBoundingClientRect();
    const x = (100 * (event.clientX - box.left)) / box.width;
    const lead = runs.indexOf(leader());
    const distance = (frames) => Math.abs(across(runs[lead].frames[frames[lead]].t) - x);
    let best = 0;
    data.timeline.forEach((frames, i) => {
      if (distance(frames) < distance(data.timeline[best])) best = i;
    });
    stop();
    go(best);
  };
  plot.addEventListener("pointerdown", seek);
  plot.addEventListener("pointermove", (event) => event.buttons && seek(event));
  const axis = element(
    "div", { className: "axis" },
    element("span", { textContent: "noise" }), element("span", { textContent: "picture" }),
  );
  const words = element(
    "figcaption", {},
    element("b", { textContent: title }), element("span", { textContent: caption }),
  );
  byId("charts").append(element("figure", { className: "chart" }, plot, axis, words));
  charts.push({ value, top, rule, dots });
}

function makeCharts() {
  const curve = data.schedule.map(([t, noise]) => [across(t), upward(noise, 1)]).reverse();
  const closed = `${line(curve)}L100 100L0 100Z`;
  const visits = leader().frames.map((frame) => `M${across(frame.t).toFixed(2)} 96V100`).join("");
  makeChart(
    "How much of x is noise",
    "The noise schedule, 1 − ᾱ, of the model’s training; the ticks are the steps of this run.",
    (frame) => frame.noise, 1, [["area", closed], ["curve", line(curve)], ["visits", visits]],
  );
  makeLines(
    "How far the guess moved",
    "The change of x₀ since the step before, relative to its length.",
    (frame) => frame.moved,
  );
  makeLines(
    "How strong the prompt is",
    runs.some((run) => run.guidance)
      ? "How much the prompt changes the predicted noise, before guidance multiplies it."
      : "There was no guidance, so there is nothing to show.",
    (frame) => frame.prompt_change,
  );
}

function makeLines(title, caption, value) {
  const known = runs.map((run) => run.frames.filter((frame) => value(frame) !== null));
  const top = Math.max(0, ...known.flat().map(value));
  const path = (frames) => line(frames.map((frame) => [across(frame.t), upward(value(frame), top)]));
  const paths = known.map((frames, i) => [LETTERS[i].toLowerCase(), path(frames)]);
  makeChart(title, caption, value, top, paths);
}

function drawMarkers(frames) {
  const lead = leader();
  for (const chart of charts) {
    chart.rule.style.left = `${across(lead.frames[frames[runs.indexOf(lead)]].t)}%`;
    runs.forEach((run, i) => {
      const frame = run.frames[frames[i]], value = chart.value(frame), dot = chart.dots[i];
      dot.hidden = value === null;
      dot.style.left = `${across(frame.t)}%`;
      dot.style.top = `${upward(value || 0, chart.top)}%`;
    });
  }
}

// --- Numbers --------------------------------------------------------------------------------

const short = (value) => (value === null ? "–" : String(Number(value.toPrecision(4))));
const ROWS = [
  ["timestep t", (frame) => String(frame.t)],
  ["next timestep", (frame) => (frame.t_prev < 0 ? "clean" : String(frame.t_prev))],
  ["ᾱ (alpha_bar)", (frame) => short(frame.alpha_bar)],
  ["‖x‖", (frame) => short(frame.x)],
  ["‖eps‖, the predicted noise", (frame) => short(frame.eps)],
  ["‖x₀‖, the guess", (frame) => short(frame.x0)],
  ["‖eps_cond − eps_uncond‖", (frame) => short(frame.difference)],
];
let cells = [];

function makeNumbers() {
  const table = element("table");
  if (runs.length > 1) {
    const heads = runs.map((_, i) => {
      const head = element("th", { textContent: `Run ${LETTERS[i]}` });
      head.scope = "col";
      return head;
    });
    table.append(element("thead", {}, element("tr", {}, element("td"), ...heads)));
  }
  const body = element("tbody");
  cells = ROWS.map(([name]) => {
    const head = element("th", { textContent: name });
    head.scope = "row";
    const values = runs.map(() => element("td"));
    body.append(element("tr", {}, head, ...values));
    return values;
  });
  table.append(body);
  byId("numbers").append(table);
}

function drawNumbers(frames) {
  ROWS.forEach(([, value], row) => {
    runs.forEach((run, i) => {
      cells[row][i].textContent = value(run.frames[frames[i]]);
    });
  });
}

// --- Changing what is shown -----------------------------------------------------------------

function change(changes) {
  Object.assign(state, changes);
  draw();
}

// A screen reader hears a step's sentence once the viewer rests there, and never while playing.
let resting = 0;

function go(position) {
  state.position = Math.min(data.timeline.length - 1, Math.max(0, position));
  draw();
  clearTimeout(resting);
  byId("spoken").textContent = "";
  if (!state.playing) {
    resting = setTimeout(() => {
      byId("spoken").textContent = byId("sentences").innerText;
    }, 800);
  }
}

let timer = 0;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

function play() {
  const last = data.timeline.length - 1;
  state.playing = true;
  showPlaying();
  if (state.position === last) go(0);
  const each = Math.max(calm.matches ? 700 : 90, 8000 / (last + 1));
  timer = setInterval(() => {
    if (state.position + 1 >= last) stop();
    go(state.position + 1);
  }, Math.min(each, 1000));
}

function stop() {
  clearInterval(timer);
  state.playing = false;
  showPlaying();
}

function showPlaying() {
  byId("play").classList.toggle("playing", state.playing);
  byId("play").setAttribute("aria-label", state.playing ? "Pause" : "Play");
}

function step(by) {
  stop();
  go(state.position + by);
}

function onKey(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.key === "Escape") return change({ pinned: null, pointed: null });
  const at = event.target;
  const last = data.timeline.length;
  const keys = {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1),
    Home: () => step(-last), End: () => step(last),
    " ": () => (state.playing ? stop() : play()),
  };
  // The slider and the choices have arrows of their own, buttons a space.
  if (at.matches("input[type=radio]") || (at === byId("slider") && event.key !== " ")) return;
  if (event.key === " " && at.matches("button, summary")) return;
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
}

makeRuns();
makeWords();
makeOptions();
makeCharts();
makeNumbers();
byId("options").open = matchMedia("(min-width: 40.01rem)").matches;
byId("slider").max = data.timeline.length - 1;
byId("slider").addEventListener("input", () => { stop(); go(Number(byId("slider").value)); });
byId("play").addEventListener("click", () => (state.playing ? stop() : play()));
byId("back").addEventListener("click", () => step(-1));
byId("forward").addEventListener("click", () => step(1));
document.addEventListener("keydown", onKey);
draw();
