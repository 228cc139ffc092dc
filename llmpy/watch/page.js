// Poll the server for changes; keep the last answer while it is down. Data of runs is inserted as text, never as markup.

const RETRY_SECONDS = 2, COLUMN_PIXELS = 430;
const find = (id) => document.getElementById(id);
const rows = new Map(); // name → row of the table
let shown = null; // names of runs; null: the server's default
let have = "", figure = null; // of the last answer with a figure
let timer = 0, turn = 0;
const loaded = new Promise((done) => addEventListener("load", done)); // plotly, in parallel with the first request

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

function element(kind, className, text = "") {
  return Object.assign(document.createElement(kind), { className, textContent: text });
}

function swatch(colour) {
  const span = element("span", "swatch");
  span.style.background = colour;
  return span;
}

/** Create the row of a run. */
function rowOf(run) {
  const row = document.createElement("tr"), label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox";
  box.onchange = () => {
    if (box.checked) shown.add(run.name); else shown.delete(run.name);
    ask();
  };
  label.append(box, swatch(run.colour), run.name, element("small", "live"), element("small", "about"));
  row.insertCell().append(label);
  for (let i = 0; i < 7; i++) row.insertCell();
  return row;
}

function fill(run) {
  const row = rows.get(run.name);
  row.className = shown.has(run.name) ? "" : "off";
  row.querySelector("input").checked = shown.has(run.name);
  row.querySelector(".live").textContent = run.trains ? "training" : "";
  row.querySelector(".about").textContent = run.described;
  [
    run.step?.toLocaleString("en"), run.loss?.toFixed(4), run.val_loss?.toFixed(4), run.val_bits_per_byte?.toFixed(3),
    run.tokens_per_s && Math.round(run.tokens_per_s).toLocaleString("en"),
    run.share_of_peak && `${Math.round(100 * run.share_of_peak)} %`,
    run.trains && run.eta_s !== undefined ? duration(run.eta_s) : "",
  ].forEach((text, i) => { row.cells[i + 1].textContent = text || ""; });
}

/** Draw the last figure in the colors of the page. */
function draw() {
  if (!figure) return;
  const resolved = (name) => {
    find("figure").style.color = `var(${name})`;
    return getComputedStyle(find("figure")).color;
  };
  Object.assign(figure.layout, {
    paper_bgcolor: resolved("--back"), plot_bgcolor: resolved("--back"),
    font: { color: resolved("--soft"), family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { bgcolor: resolved("--card"), bordercolor: resolved("--line"), font: { color: resolved("--text") } },
  });
  Plotly.react("figure", figure.data, figure.layout, figure.config);
}

function take(answer) {
  const fresh = answer.runs.filter((run) => !rows.has(run.name));
  if (shown) fresh.filter((run) => run.trains).forEach((run) => shown.add(run.name)); // started since the page opened
  else shown = new Set(answer.shown);
  const names = new Set(answer.runs.map((run) => run.name));
  for (const [name, row] of rows) if (!names.has(name)) { row.remove(); rows.delete(name); }
  for (const run of fresh) {
    rows.set(run.name, rowOf(run));
    find("runs").append(rows.get(run.name)); // rows keep their order, whichever run is the newest
  }
  answer.runs.forEach(fill);
  const left = answer.runs.filter((run) => shown.has(run.name) && run.trains).map((run) => run.eta_s || 0);
  document.title = left.length ? `${duration(Math.max(...left))} left – llm.py` : "llm.py";
  have = answer.have;
  if (!answer.figure) return;
  figure = { ...JSON.parse(answer.figure), config: answer.config };
  draw();
  const colours = Object.fromEntries(answer.runs.map((run) => [run.name, run.colour]));
  find("samples").replaceChildren(...answer.samples.map((sample) => {
    const article = document.createElement("article"), title = document.createElement("h2");
    title.append(swatch(colours[sample.name]), `step ${sample.step.toLocaleString("en")} · ${sample.name}`);
    article.append(title, element("pre", "", sample.text));
    return article;
  }));
}

async function ask() {
  clearTimeout(timer);
  const mine = ++turn, columns = Math.floor(document.body.clientWidth / COLUMN_PIXELS);
  const words = new URLSearchParams({ have, axis: find("axis").value, over: find("over").value });
  words.append("columns", Math.min(3, Math.max(1, columns)));
  if (find("log").checked) words.append("log", "");
  if (shown) ["", ...shown].forEach((name) => words.append("show", name));
  let wait = RETRY_SECONDS;
  try {
    const answer = await fetch(`board?${words}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const [board] = await Promise.all([answer.json(), loaded]);
    if (mine !== turn) return; // a newer request is running
    take(board);
    wait = board.wait;
    find("status").textContent = figure.data.length ? "" : "no numbers yet";
    find("status").className = "";
  } catch (error) {
    if (mine !== turn) return;
    find("status").textContent = `llmpy watch does not answer (${error.message}); showing its last answer`;
    find("status").className = "error";
  }
  timer = setTimeout(ask, 1000 * wait);
}

for (const id of ["axis", "over", "log"]) find(id).onchange = ask;
matchMedia("(prefers-color-scheme: dark)").onchange = draw;
ask();
