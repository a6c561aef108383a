// A model that draws: the exported graphs, run by ONNX Runtime Web.
//
//   const model = await Model.load(ort, files)   // files: {name: Uint8Array}, see ldm.export
//   for await (const step of model.run({ prompt, negative, seed, steps, scale })) ...
//   await model.decode(step.xPrev) -> Float32Array near [-1, 1], (3, H, W)

export class Model {
  static async load(ort, files) {
    const text = (name) => new TextDecoder().decode(files[name]);
    const open = (name, externalData) =>
      ort.InferenceSession.create(files[name], { executionProviders: ["wasm"], externalData });
    const model = new Model();
    model.ort = ort;
    model.about = JSON.parse(text("model.json"));
    const lines = text("merges.txt").split("\n").slice(1).filter(Boolean);
    const words = files["words.json"] ? JSON.parse(text("words.json")) : null;
    const merges = lines.map((line) => line.split(" "));
    model.tokenizer = new Tokenizer(JSON.parse(text("vocab.json")), merges, words);
    const weights = [{ path: "unet.weights", data: files["unet.weights"] }];
    model.text = await open("text.onnx");
    model.unet = await open("unet.onnx", weights);
    model.decoder = await open("decoder.onnx");
    return model;
  }

  // (C, h, w) of the latents.
  get shape() {
    const { image_size: size, vae } = this.about.config;
    const side = size / 2 ** (vae.channel_mult.length - 1);
    return [vae.latent_channels, side, side];
  }

  // Text states of two prompts, (2, L, D).
  async context(prompts) {
    const length = this.about.config.text.max_length;
    const ids = prompts.flatMap((one) => this.tokenizer.pad(this.tokenizer.encode(one), length));
    const tensor = new this.ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [2, length]);
    return (await this.text.run({ ids: tensor })).context;
  }

  // The predictions with and without the prompt.
  async predict(x, t, context) {
    const { ort, about } = this;
    const length = about.config.text.max_length, blocks = about.blocks.length;
    const twice = new Float32Array(2 * x.length);
    twice.set(x);
    twice.set(x, x.length);
    const output = await this.unet.run({
      x: new ort.Tensor("float32", twice, [2, ...this.shape]),
      t: new ort.Tensor("int64", BigInt64Array.of(BigInt(t), BigInt(t)), [2]),
      context,
      bias: new ort.Tensor("float32", new Float32Array(2 * length), [2, length]),
      weight: new ort.Tensor("float32", new Float32Array(2 * length).fill(1), [2, length]),
      gates: new ort.Tensor("float32", new Float32Array(blocks).fill(1), [blocks]),
    });
    const both = output.prediction.data;
    return { uncond: both.slice(0, x.length), cond: both.slice(x.length) };
  }

  // A run, step by step; a step is {index, t, scale, x, x0, cond, uncond, xPrev}. With a step of
  // an earlier run `from`, that step is taken again, from the predictions that it has, and the rest
  // follows: only what comes after it is asked anew.
  async *run({ prompt, negative, seed, steps, scale }, from = null) {
    const { alpha_bar: alphaBar, config } = this.about;
    const context = await this.context([negative, prompt]);
    const size = this.shape.reduce((a, b) => a * b);
    let x = from ? from.x : new Normals(seed).draw(size);
    const grid = ddimTimesteps(steps, alphaBar);
    for (let index = from ? from.index : 0; index < grid.length; index++) {
      const [t, tPrev] = grid[index];
      const known = from && index === from.index;
      const { cond, uncond } = known ? from : await this.predict(x, t, context);
      const output = guided(cond, uncond, scale);
      const pair = pairFrom(config.prediction, output, x, alphaBar[t]);
      const xPrev = ddimStep(pair, alphaBar[tPrev]);
      yield { index, t, scale, x, x0: pair.x0, cond, uncond, xPrev };
      x = xPrev;
    }
  }

  async decode(latents) {
    const tensor = new this.ort.Tensor("float32", latents, [1, ...this.shape]);
    return (await this.decoder.run({ latents: tensor })).image.data;
  }
}
