// The curves, and the marker that runs along them: time runs from the noise on the left to the
// picture on the right.

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
