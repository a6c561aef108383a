// The timeline: slider, keys, playing.

// A screen reader hears a step's sentence once the viewer rests there, and never while playing.
let resting = 0;

function go(position) {
  state.position = Math.min(data.timeline.length - 1, Math.max(0, position));
  draw();
  clearTimeout(resting);
  byId("spoken").textContent = "";
  if (!state.playing) {
    resting = setTimeout(() => {
      const said = [...document.querySelectorAll(".sentence")].map((one) => one.innerText);
      byId("spoken").textContent = said.join(" ");
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
