// Makes everything, once.

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
