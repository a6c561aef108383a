// Colours, and the panels of a run: x, x0 with the attention of a word over it, and guidance.

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

const label = (canvas, text) => canvas.setAttribute("aria-label", text);

// One frame of a run. The overlay is the attention of a word, or null.
function drawPanels(run, frame, word, overlay) {
  const elements = run.elements;
  const step = `at step ${run.frames[frame].step + 1} of ${run.steps}`;
  paint(elements.x, run.x[frame]);
  paint(elements.x0, run.x0[frame], overlay);
  label(elements.x, `The noisy latents ${step}, decoded`);
  const laid = overlay ? `, with the attention of ${wordName(run.words[word])} laid over it` : "";
  label(elements.x0, `The guess of the finished picture ${step}${laid}`);
  if (!run.guidance) return;
  const cells = run.guidance.rows * run.guidance.columns;
  const values = Float32Array.from(
    run.guidance.levels.subarray(frame * cells, (frame + 1) * cells),
  );
  elements.peak.textContent = run.guidance.peaks[frame].toPrecision(2);
  const context = elements.guidance.getContext("2d");
  context.drawImage(heat({ ...run.guidance, values }, 255, () => 1), 0, 0);
  label(elements.guidance, `Where the prompt changes the predicted noise ${step}`);
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
    copy.querySelector(".sentence").append(run.elements.sentence);
    if (i === runs.length - 1) {
      copy.querySelector(".sentence").append(element("span", { id: "apart" }));
    }
    byId("runs").append(copy);
  });
}
