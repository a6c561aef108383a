// The table of a step's numbers.

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
