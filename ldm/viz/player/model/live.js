// The page: what is asked for, a run of the model, and its steps to look at again.

const byId = (id) => document.getElementById(id);
const page = { model: null, steps: [], run: 0, asked: null };

// Base64 in the page, gzip in the base64. A script element of an unknown type is text to a browser.
async function file(element) {
  const packed = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  element.remove();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function start() {
  const files = {};
  for (const element of document.querySelectorAll("script[data-file]")) {
    files[element.dataset.file] = await file(element);
  }
  const source = new Blob([files["ort.wasm.bundle.min.mjs"]], { type: "text/javascript" });
  const url = URL.createObjectURL(source);
  const ort = await import(url);
  URL.revokeObjectURL(url);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = files["ort-wasm-simd-threaded.wasm"].buffer;
  page.model = await Model.load(ort, files);
  byId("draw").disabled = false;
  showUnseen();
  await begin();
}

function asked() {
  return {
    prompt: byId("prompt").value,
    negative: byId("negative").value,
    seed: byId("seed").value,
    steps: Number(byId("steps").value),
    scale: Number(byId("scale").value),
  };
}

const begin = () => {
  page.asked = asked();
  return follow(page.model.run(page.asked), 0);
};

// Another run ends the one before: at its next step, that sees that it is no longer the one.
async function follow(steps, first) {
  const mine = ++page.run;
  const began = performance.now();
  page.steps.length = first;
  for await (const step of steps) {
    if (mine !== page.run) return;
    page.steps[step.index] = step;
    byId("slider").max = step.index;
    byId("slider").value = step.index;
    byId("status").textContent = `Step ${step.index + 1} of ${page.asked.steps}`;
    await show(step.index);
  }
  if (mine !== page.run) return;
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  byId("slider").disabled = byId("dragged").disabled = false;
  byId("status").textContent = `Drawn in ${seconds} s.`;
  document.body.dataset.drawn = mine;
}

async function show(index) {
  const step = page.steps[index], last = index === page.asked.steps - 1;
  const image = await page.model.decode(last ? step.xPrev : step.x0);
  paint(byId("picture"), image);
  const noise = 1 - page.model.about.alpha_bar[step.t];
  byId("said").textContent = last
    ? `The picture, after step ${index + 1}.`
    : `Step ${index + 1}, t = ${step.t}: the model's guess of the finished picture, from latents ` +
      `that are ${(100 * noise).toPrecision(2)}% noise.`;
  byId("dragged-now").textContent = step.scale;
  byId("dragged").value = step.scale;
  byId("picture").setAttribute("aria-label", `“${page.asked.prompt}”, step ${index + 1}`);
}

// Levels as ldm.pictures has them: rounded, from [-1, 1] to 0 ... 255.
function paint(canvas, image) {
  const side = Math.sqrt(image.length / 3), cells = side * side;
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const pixels = context.createImageData(side, side);
  for (let i = 0; i < cells; i++) {
    for (let c = 0; c < 3; c++) {
      pixels.data[4 * i + c] = 127.5 * (Math.min(1, Math.max(-1, image[c * cells + i])) + 1);
    }
    pixels.data[4 * i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}

function showUnseen() {
  const unseen = page.model ? page.model.tokenizer.unseen(byId("prompt").value) : [];
  byId("unseen").textContent = unseen.length
    ? `This model has never seen ${unseen.map((word) => `“${word}”`).join(", ")}.`
    : "";
}

byId("prompt").addEventListener("input", showUnseen);
byId("asked").addEventListener("submit", (event) => {
  event.preventDefault();
  if (page.model) begin();
});
byId("slider").addEventListener("input", () => show(Number(byId("slider").value)));
byId("dragged").addEventListener("change", () => {
  const first = Number(byId("slider").value);
  const changed = { ...page.asked, scale: Number(byId("dragged").value) };
  follow(page.model.run(changed, page.steps[first]), first);
});
start().catch((error) => {
  byId("status").textContent = `The model cannot run here: ${error.message}`;
});
