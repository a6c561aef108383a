"use strict";

// What the page holds, one run or two, and the one state that changes: `draw` shows it, everything
// else either makes elements once or changes `state` and calls `draw`. The files of this script are
// joined to one, in the order that page.py states.

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

const percent = (share) => `${Number((100 * share).toPrecision(share > 0.99 ? 3 : 2))}%`;

// The run that the timeline follows.
const leader = () => runs.reduce((a, b) => (b.frames.length > a.frames.length ? b : a));

function change(changes) {
  Object.assign(state, changes);
  draw();
}

// --- Making elements ------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function tag(i) {
  return element("span", { className: `tag ${LETTERS[i].toLowerCase()}`, textContent: LETTERS[i] });
}
