// What is shown is kept in the address, behind its "#": a link to it shows the same to somebody else.
const CONTROLS = [
  "filter", "differences", "turned", "chart-choice", "log-y", "log-x", "scatter-x", "scatter-y", "scatter-front", "scatter-way",
  "scatter-log-x", "scatter-log-y", "heat-metric", "heat-view",
];
const view = { initial: null };

// The fragment is of a page with as many runs, metrics and curves; another comparison ignores it.
function pageMark() {
  return [data.rows, data.columns, data.charts, data.scatter.quantities, data.heat].map((list) => list.length).join("-");
}

function controls() {
  return CONTROLS.map(byId).filter(Boolean);
}

function stateOf(control) {
  return control.type === "checkbox" ? String(Number(control.checked)) : control.value;
}

function indices(flags) {
  return flags.map((on, index) => (on ? index : -1)).filter((index) => index >= 0).join(".");
}

function currentView() {
  const state = { runs: indices(shown.runs), columns: indices(shown.columns), sort: String(table.sort), down: String(Number(table.descending)) };
  for (const control of controls()) state[control.id] = stateOf(control);
  return state;
}

function saveView() {
  if (!view.initial) return;
  const state = currentView();
  const changed = Object.entries(state).filter(([key, value]) => value !== view.initial[key]);
  const text = new URLSearchParams([["view", pageMark()], ...changed]).toString();
  byId("view-link").setAttribute("href", `#${text}`);
  const wanted = changed.length ? `#${text}` : "";
  const now = location.hash.startsWith("#view=") ? location.hash : "";
  if (wanted !== now) history.replaceState(null, "", location.href.split("#")[0] + wanted);
}

function setControl(control, value) {
  if (control.type === "checkbox") {
    if (control.disabled || control.checked === (value === "1")) return;
    control.checked = value === "1";
  } else {
    const known = control.tagName !== "SELECT" || [...control.options].some((option) => option.value === value);
    if (!known || control.value === value) return;
    control.value = value;
  }
  control.dispatchEvent(new Event(control.type === "search" ? "input" : "change"));
}

function restoreView() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.get("view") !== pageMark()) return;
  const state = { ...view.initial, ...Object.fromEntries(given) };
  for (const control of controls()) setControl(control, state[control.id]);
  const runs = new Set(state.runs.split(".").map(Number)), columns = new Set(state.columns.split(".").map(Number));
  data.rows.forEach((_, index) => {
    if (shown.runs[index] !== (state.runs !== "" && runs.has(index))) chooseRun(index, !shown.runs[index]);
  });
  const wanted = state.sort === "name" ? "name" : state.sort === "null" ? null : Number(state.sort);
  table.sort = wanted === null || wanted === "name" || data.columns[wanted] ? wanted : null;
  table.descending = state.down === "1";
  chooseMetrics((_, index) => state.columns !== "" && columns.has(index));
  saveView();
}

function startView() {
  view.initial = currentView();
  restoreView();
  saveView();
  for (const name of ["change", "input", "click"]) document.addEventListener(name, saveView);
  addEventListener("hashchange", restoreView);
}
