
// The page: asks for what is new every second, keeps what it has while nobody answers. What runs hold is text, never markup.

const CHARTS = [
  { key: "loss", also: "val_loss", title: "loss", note: "○ validation, ▲ skipped or not finite", wide: true, log: true,
    clip: 20, marks: true },
  { key: "lr", title: "learning rate", zero: true },
  { key: "grad_norm", title: "gradient norm", note: "▲ outliers", clip: 3, log: true, outliers: true, zero: true },
  { key: "tokens_per_s", title: "tokens a second", clip: 3, zero: true },
  { key: "share_of_peak", title: "% of peak", scale: 100, clip: 3, zero: true },
  { key: "val_bits_per_byte", title: "validation, bits a byte", log: true },
  { key: "hellaswag", title: "HellaSwag, % right", scale: 100 },
];
const ALONG = { step: "steps", tokens: "tokens", seconds: "time" };
const OVER = [0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 100000];
const COLOURS = 8;
const ASK_MS = 1000, HURRY_MS = 30, RETRY_MS = 2000;

const find = (id) => document.getElementById(id);
const known = new Map(); // name → run: colour, row of the table, picture, samples, version
const held = find("data") && JSON.parse(find("data").textContent); // of a page that was saved
let coloured = 0; // runs that ever got a colour: those that went do not count down, or two would share one
let chosen = null; // names to show; null: as the server thinks
let over = null; // steps to smooth over; null: as fits
let drawing = false, asking = null, timer = 0;

const look = {
  view: null, at: null, over: null, drag: null, log: false, axis: "step",
  runs: () => picked().filter((run) => !unplaced(run)),
  zoom(view) {
    look.view = view;
    find("whole").hidden = !view;
    again();
  },
};

/** The runs that were chosen, as far as they have come. */
function picked() { return [...known.values()].filter((run) => chosen?.has(run.name) && run.picture); }

/** Whether a run cannot be shown: its lines do not tell what the axis asks for. */
function unplaced(run) { return look.axis !== "step" && run.picture?.clock.step.length === 0; }

function redraw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    charts.forEach((chart) => chart.draw());
  });
}
const charts = CHARTS.map((about) => new Chart(about, look, redraw));
find("charts").append(...charts.map((chart) => chart.figure));

function ago(seconds) {
  const s = Math.round(seconds);
  if (s < 90) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${(s / 86400).toFixed(1)} days`;
}

/** A row of the table, made once for every run. */
function rowOf(run) {
  const row = document.createElement("tr"), label = document.createElement("label"), box = document.createElement("input");
  const swatch = document.createElement("span"), about = document.createElement("small"), state = document.createElement("small");
  box.type = "checkbox";
  swatch.className = "swatch";
  swatch.style.background = `var(${run.colour})`;
  box.onchange = () => {
    if (box.checked) chosen.add(run.name); else chosen.delete(run.name);
    again();
  };
  label.append(box, swatch, run.name, state, about);
  row.insertCell().append(label);
  for (let i = 0; i < 7; i++) row.insertCell();
  find("runs").append(row);
  return { row, box, about, state };
}

function fill(run) {
  const { row, box, about, state } = run.line, n = run.numbers || {};
  box.checked = chosen.has(run.name);
  row.className = box.checked ? "" : "off";
  about.textContent = run.described;
  state.textContent = run.trains ? "training" : "";
  if (box.checked && unplaced(run)) state.textContent = `its metrics tell no ${ALONG[look.axis]}`;
  if (box.checked && run.read < 1) state.textContent = `reading, ${Math.floor(100 * run.read)} %`;
  state.className = run.trains ? "live" : "";
  const cells = [
    n.step?.toLocaleString("en"), n.loss?.toFixed(4), n.val_loss?.toFixed(4), n.val_bits_per_byte?.toFixed(3),
    n.tokens_per_s && shown(n.tokens_per_s), n.share_of_peak && `${Math.round(100 * n.share_of_peak)} %`,
    run.trains && n.eta_s !== undefined ? ago(n.eta_s) : "",
  ];
  cells.forEach((text, i) => { row.cells[i + 1].textContent = text || ""; });
}

/** Samples of the runs shown, built anew only if they changed, so that a reader keeps his place. */
function tellSamples() {
  const all = picked().flatMap((run) => run.samples.map((sample) => ({ run, ...sample })));
  const mark = JSON.stringify(all.map(({ run, step, text }) => [run.name, step, text]));
  if (mark === tellSamples.mark) return;
  tellSamples.mark = mark;
  find("samples").replaceChildren(...all.map(({ run, step, text }) => {
    const article = document.createElement("article"), title = document.createElement("h2"), body = document.createElement("pre");
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = `var(${run.colour})`;
    title.append(swatch, `sample at step ${step.toLocaleString("en")}, ${run.name}`);
    body.textContent = text;
    article.append(title, body);
    return article;
  }));
}

/** Take in an answer. */
function take(board) {
  const begin = chosen === null;
  if (begin) chosen = new Set(board.chosen);
  for (const row of board.runs) {
    let run = known.get(row.name);
    if (!run) {
      run = { name: row.name, colour: `--run${coloured++ % COLOURS}` };
      run.line = rowOf(run);
      known.set(row.name, run);
      if (!begin && row.trains) chosen.add(row.name); // a run that begins while the page is open
    }
    for (const curve of Object.values(row.picture?.curves || {}))
      for (const axis of ["tokens", "seconds"]) curve[axis] = curve.step.map((step) => along(row.picture.clock, axis, step));
    Object.assign(run, row);
  }
  const there = new Set(board.runs.map((row) => row.name));
  for (const [name, run] of known)
    if (!there.has(name)) {
      run.line.row.remove();
      known.delete(name);
    }
  known.forEach(fill);
  tellSamples();
  redraw();
  const left = [...known.values()].filter((run) => chosen.has(run.name) && run.trains && run.numbers?.eta_s !== undefined);
  document.title = left.length ? `${ago(Math.max(...left.map((run) => run.numbers.eta_s)))} left – llm.py` : "llm.py";
}

async function ask() {
  const words = new URLSearchParams();
  for (const name of chosen || []) {
    words.append("show", name);
    words.append("have", known.get(name)?.picture ? known.get(name).version : "");
  }
  if (chosen && !chosen.size) words.append("show", "");
  if (look.view) {
    words.append("first", look.view[0]);
    words.append("last", look.view[1]);
    words.append("axis", look.axis);
  }
  if (over !== null) words.append("over", over);
  const turn = (asking = {});
  let wait = ASK_MS;
  try {
    const answer = await fetch(`board?${words}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const board = await answer.json();
    if (turn !== asking) return; // asked anew meanwhile
    take(board);
    if (board.runs.some((run) => run.read < 1)) wait = HURRY_MS;
    tell("");
  } catch (fault) {
    if (turn !== asking) return;
    tell(`llmpy watch does not answer (${fault.message}); what is shown is what it told last`);
    wait = RETRY_MS;
  }
  timer = setTimeout(ask, wait);
}

function tell(fault) {
  find("said").textContent = fault;
  find("said").className = fault ? "fault" : "";
}

/** What is to be shown has changed: draw what is there, and ask at once. */
function again() {
  known.forEach(fill);
  tellSamples();
  redraw();
  if (!held) {
    clearTimeout(timer);
    ask();
  }
}

/** What was chosen here before; a page from a file may have no storage. */
function kept(name) {
  try { return localStorage.getItem(name) || ""; } catch { return ""; }
}
function keep(name, value) {
  try { localStorage.setItem(name, value); } catch { /* the same */ }
}

// Light, dark, or as the system has it.
const THEMES = ["", "light", "dark"];
function theme(name) {
  if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
  find("theme").textContent = name || "as the system";
  redraw();
}
let themed = kept("theme");
theme(THEMES.includes(themed) ? themed : "");
find("theme").onclick = () => {
  themed = THEMES[(THEMES.indexOf(themed) + 1) % THEMES.length];
  keep("theme", themed);
  theme(themed);
};
matchMedia("(prefers-color-scheme: dark)").onchange = redraw;

find("over").append(new Option("what fits", ""), ...OVER.map((n) => new Option(n ? `${n.toLocaleString("en")} steps` : "nothing", n)));
find("over").onchange = (event) => {
  over = event.target.value === "" ? null : Number(event.target.value);
  again();
};
look.axis = held?.axis || (Object.hasOwn(ALONG, kept("axis")) ? kept("axis") : "step"); // a saved page has its own
find("axis").append(...Object.entries(ALONG).map(([axis, name]) => new Option(name, axis, false, axis === look.axis)));
find("axis").onchange = (event) => {
  look.axis = event.target.value;
  keep("axis", look.axis);
  look.zoom(null);
};
find("log").onchange = (event) => { look.log = event.target.checked; redraw(); };
find("whole").onclick = () => look.zoom(null);

if (held) {
  find("smoothing").hidden = true;
  take(held);
} else ask();
