// Shows the state, all of it.

function draw() {
  const frames = data.timeline[state.position];
  const looking = [];
  runs.forEach((run, i) => {
    const frame = frames[i];
    const word = chosen() && counterpart(runs[chosen().run], chosen().word, run);
    let overlay = null;
    if (chosen() && word !== null) {
      const map = wordMap(run, frame, word);
      const peak = state.scale === "own" ? peakOf(map) : sharedPeak(run, frame);
      const bare = state.scale === "own" && isFlat(map); // stretched to its own peak, it would lie
      overlay = heat(map, peak, (share) => (bare ? 0 : Math.min(0.88, 1.5 * share)));
      looking.push(lookingWords(run, i, word, map, peak));
    } else if (chosen()) {
      looking.push(`Run ${LETTERS[i]} has no such word.`);
    }
    drawPanels(run, frame, word, overlay);
    drawWords(run, word);
    run.elements.sentence.textContent = run.frames[frame].sentence;
  });
  byId("looking").textContent = looking.join(" ") || HINT;
  const apart = data.apart ? ` The two guesses are ${percent(data.apart[state.position])} apart.` : "";
  byId("apart").textContent = apart;
  drawTimeline(frames);
  drawMarkers(frames);
  drawNumbers(frames);
}

function drawTimeline(frames) {
  const lead = leader(), now = lead.frames[frames[runs.indexOf(lead)]];
  byId("slider").value = state.position;
  byId("slider").setAttribute("aria-valuetext", `Step ${now.step + 1} of ${lead.steps}`);
  byId("where-now").replaceChildren(
    `${now.step + 1} / ${lead.steps}`,
    element("small", { textContent: `t = ${now.t}` }),
  );
}
