// The buttons of the prompt's words, what is said of the one that is chosen, and the options of how
// its map is shown.

const HINT =
  "Point at a word, or tab to it, to see which places of the picture look at it. Press it to keep " +
  "that there; Escape lets go.";

const chosen = () => state.pointed || state.pinned;

// The same word of another run: the same text, the same kind, the same one of several.
function counterpart(from, word, to) {
  if (from === to) return word;
  const same = (one) => one.text === from.words[word].text && one.kind === from.words[word].kind;
  const places = (run) => run.words.flatMap((one, i) => (same(one) ? [i] : []));
  const found = places(to)[places(from).indexOf(word)];
  return found === undefined ? null : found;
}

function wordName(word) {
  const names = { start: "the start of the text", end: "the end of the text" };
  return names[word.kind] || `“${word.text}”`;
}

function lookingWords(run, i, word, map, peak) {
  const who = runs.length > 1 ? `Run ${LETTERS[i]}: ` : "";
  const when = state.when === "average" ? "on average over all steps" : "at this step";
  const name = wordName(run.words[word]);
  const scale = state.scale === "own" ? "" : ` Full brightness is ${percent(peak)}.`;
  const flat = isFlat(map) ? " That is nearly the same everywhere." : "";
  return (
    `${who}${name[0].toUpperCase() + name.slice(1)} gets up to ${percent(peakOf(map))} of a ` +
    `place’s attention ${when}; the mean over the picture is ${percent(meanOf(map))}.${flat}${scale}`
  );
}

// The buttons of a run: which word is shown, and which is pressed. A run may share another's.
function drawWords(run, word) {
  const { pinned } = state;
  const pressed = pinned && counterpart(runs[pinned.run], pinned.word, run);
  run.elements.words.forEach((button, i) => {
    button.classList.toggle("shown", Boolean(chosen()) && word === i);
    button.setAttribute("aria-pressed", String(Boolean(pinned) && pressed === i));
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
