const heat = { at: null, rows: [], layers: [] };
// dark to light, in order also where colours cannot be told: cividis
const HEAT = [[0, 32, 76], [0, 54, 110], [60, 77, 107], [96, 100, 110], [124, 123, 120], [155, 147, 119], [188, 172, 109], [222, 199, 90], [255, 234, 70]];
const HEAT_LEFT = 150, HEAT_TOP = 8, HEAT_BOTTOM = 62;

function heatColour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(place), HEAT.length - 2);
  const mixed = HEAT[low].map((value, i) => Math.round(value + (place - low) * (HEAT[low + 1][i] - value)));
  return `rgb(${mixed.join(",")})`;
}

function heatRow(label, one, step) {
  return { label, of: new Map(one.layers.map((layer, i) => [layer, one.values[step][i]])) };
}

// A line for each run at its last step, or for each step of one run.
function heatRows() {
  const about = data.heat[Number(byId("heat-metric").value)];
  const run = byId("heat-view").value;
  if (run === "") {
    const visible = about.of.filter((one) => shown.runs[one.row]);
    return visible.map((one) => heatRow(data.rows[one.row].label, one, one.steps.length - 1));
  }
  const one = about.of.find((each) => each.row === Number(run));
  return one ? one.steps.map((step, i) => heatRow(`step ${step.toLocaleString("en")}`, one, i)) : [];
}

function shortened(text) {
  return text.length > 21 ? `${text.slice(0, 20)}…` : text;
}

function renderHeat() {
  const about = data.heat[Number(byId("heat-metric").value)];
  const run = byId("heat-view").value;
  heat.rows = heatRows();
  heat.layers = [...new Set(heat.rows.flatMap((row) => [...row.of.keys()]))].sort((a, b) => a - b);
  const values = heat.rows.flatMap((row) => [...row.of.values()]).filter((value) => value !== null);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const box = byId("heat");
  const width = Math.max(260, box.clientWidth), left = Math.min(HEAT_LEFT, width * 0.4);
  const step = Math.max(12, Math.min(26, 480 / Math.max(1, heat.rows.length)));
  const height = HEAT_TOP + HEAT_BOTTOM + step * heat.rows.length;
  const across = (width - left - 8) / Math.max(1, heat.layers.length);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  heat.rows.forEach((row, y) => {
    svg.append(drawn("text", { x: left - 6, y: HEAT_TOP + step * (y + 0.5) + 4, "text-anchor": "end" }, shortened(row.label)));
    heat.layers.forEach((layer, x) => {
      const value = row.of.get(layer);
      const place = { x: left + across * x, y: HEAT_TOP + step * y, width: Math.max(1, across - 1), height: step - 1 };
      const known = value !== null && value !== undefined;
      svg.append(drawn("rect", { ...place, class: known ? "cell" : "cell none", fill: known ? heatColour(high > low ? (value - low) / (high - low) : 0.5) : "none" }));
    });
  });
  svg.append(...heatAxis(left, across, height, about), ...(values.length ? heatScale(left, height, low, high) : []));
  if (heat.at) svg.append(drawn("rect", { x: left + across * heat.at[1], y: HEAT_TOP + step * heat.at[0], width: across, height: step, class: "chosen" }));
  box.replaceChildren(svg);
  const title = about.detail ? `${about.title}, ${about.detail}` : about.title;
  const view = run === "" ? "each run at its last step" : data.rows[Number(run)].label;
  byId("heat-title").replaceChildren(`${title}: ${view}`, element("span", { class: "sub" }, about.unit));
  box.setAttribute("aria-label", `Heat map: ${title}, ${view}. ${heat.rows.length} by ${heat.layers.length} layers.`);
  renderHeatValue(title);
  renderHeatTable();
}

function heatAxis(left, across, height, about) {
  const every = Math.ceil(34 / Math.max(across, 1));
  const labels = heat.layers.map((layer, x) => [layer, x]).filter(([, x]) => x % every === 0);
  const below = height - HEAT_BOTTOM + 16;
  return [
    ...labels.map(([layer, x]) => drawn("text", { x: left + across * (x + 0.5), y: below, "text-anchor": "middle" }, String(layer))),
    drawn("text", { x: left - 6, y: below, "text-anchor": "end" }, about.title.startsWith("H") ? "layer" : "layer (0: embeddings)"),
  ];
}

function heatScale(left, height, low, high) {
  const parts = 18, y = height - 26;
  const bar = [...Array(parts).keys()].map((i) => drawn("rect", { x: left + 8 * i, y, width: 8, height: 12, fill: heatColour(i / (parts - 1)) }));
  return [
    ...bar,
    drawn("text", { x: left - 6, y: y + 11, "text-anchor": "end" }, number(low, 3)),
    drawn("text", { x: left + 8 * parts + 6, y: y + 11 }, number(high, 3)),
  ];
}

function renderHeatValue() {
  const [row, x] = heat.at || [];
  const chosen = heat.rows[row];
  const value = chosen && chosen.of.get(heat.layers[x]);
  byId("heat-readout").textContent = chosen ? `${chosen.label}, layer ${heat.layers[x]}: ${value === undefined || value === null ? "not measured" : number(value, 4)}` : "";
}

function renderHeatTable() {
  const holder = byId("heat-data");
  if (!holder.open) return;
  const head = ["", ...heat.layers.map((layer) => `layer ${layer}`)].map((text) => element("th", { scope: "col" }, text));
  holder.querySelector("thead").replaceChildren(element("tr", {}, ...head));
  holder.querySelector("tbody").replaceChildren(...heat.rows.map((row) => {
    const cells = heat.layers.map((layer) => element("td", {}, row.of.has(layer) ? number(row.of.get(layer), 4) : ""));
    return element("tr", {}, element("th", { scope: "row" }, row.label), ...cells);
  }));
}

function pointHeat(event) {
  const box = byId("heat").getBoundingClientRect();
  const left = Math.min(HEAT_LEFT, box.width * 0.4);
  const across = (Math.max(260, box.width) - left - 8) / Math.max(1, heat.layers.length);
  const step = Math.max(12, Math.min(26, 480 / Math.max(1, heat.rows.length)));
  const [row, x] = [Math.floor((event.clientY - box.top - HEAT_TOP) / step), Math.floor((event.clientX - box.left - left) / across)];
  heat.at = heat.rows[row] && x >= 0 && x < heat.layers.length ? [row, x] : null;
  renderHeat();
}

function keyHeat(event) {
  const [row, x] = heat.at || [0, 0];
  const [last, right] = [heat.rows.length - 1, heat.layers.length - 1];
  const moves = { ArrowUp: [row - 1, x], ArrowDown: [row + 1, x], ArrowLeft: [row, x - 1], ArrowRight: [row, x + 1], Home: [row, 0], End: [row, right] };
  const target = moves[event.key];
  if (event.key === "Escape") heat.at = null;
  else if (!target || last < 0) return;
  else heat.at = heat.at === null && event.key.startsWith("Arrow") ? [0, 0] : [Math.min(Math.max(target[0], 0), last), Math.min(Math.max(target[1], 0), right)];
  event.preventDefault();
  renderHeat();
}

function startHeat() {
  if (!data.heat.length) {
    byId("heat-section").replaceChildren();
    return;
  }
  data.heat.forEach((one, index) => {
    byId("heat-metric").append(element("option", { value: index }, one.detail ? `${one.title} (${one.detail})` : one.title));
  });
  byId("heat-view").append(element("option", { value: "" }, "Runs × layers, at the last step"));
  for (const row of new Set(data.heat.flatMap((one) => one.of.map((each) => each.row)))) {
    byId("heat-view").append(element("option", { value: row }, `Steps × layers: ${data.rows[row].label}`));
  }
  for (const id of ["heat-metric", "heat-view"]) {
    byId(id).addEventListener("change", () => {
      heat.at = null;
      renderHeat();
    });
  }
  byId("heat").addEventListener("pointermove", pointHeat);
  byId("heat").addEventListener("pointerdown", pointHeat);
  byId("heat").addEventListener("keydown", keyHeat);
  byId("heat-data").addEventListener("toggle", renderHeatTable);
  new ResizeObserver(() => renderHeat()).observe(byId("heat"));
  renderHeat();
}
