const plot = { points: [], front: [], at: null, shape: null };
const FRONTS = [
  ["", "none"],
  ["smaller smaller", "small x, small y"],
  ["smaller larger", "small x, large y"],
  ["larger smaller", "large x, small y"],
  ["larger larger", "large x, large y"],
];

function quantity(axis) {
  return data.scatter.quantities[Number(byId(`scatter-${axis}`).value)];
}

function nameOf(one) {
  const about = [one.detail, one.group === "Cost" ? one.unit : ""].filter(Boolean).join(", ");
  return about ? `${one.title} (${about})` : one.title;
}

// The values of a run: by step, one for the whole run, and where it is taken between two checkpoints.
function valuesOf(one, run) {
  const found = one.of.find((entry) => entry[0] === run);
  if (!found) return null;
  const [, list, values, between] = found;
  if (list < 0) return { steps: [], at: () => values[0], between: values[0], whole: true };
  const steps = data.scatter.steps[list];
  return { steps, at: (step) => values[steps.indexOf(step)], between: between === undefined ? null : between, whole: false };
}

function pointsOf(run) {
  const about = data.scatter.runs[run];
  const [x, y] = ["x", "y"].map((axis) => valuesOf(quantity(axis), run));
  if (!x || !y) return [];
  if (x.whole && y.whole) return [{ run, step: null, x: x.at(), y: y.at(), last: true }];
  const steps = (x.whole ? y : x).steps.filter((step) => x.whole || y.whole || y.steps.includes(step));
  const points = steps.map((step) => ({ run, step, x: x.at(step), y: y.at(step), last: step === about.step }));
  const between = x.between !== null && y.between !== null && !(x.whole && y.whole);
  if (about.step !== undefined && !steps.includes(about.step) && between) {
    points.push({ run, step: about.step, x: x.between, y: y.between, last: true });
    points.sort((a, b) => a.step - b.step);
  }
  if (about.step === undefined && points.length) points[points.length - 1].last = true;
  return points;
}

function visibleRuns() {
  return data.scatter.runs.map((_, run) => run).filter((run) => data.scatter.runs[run].label !== undefined && shown.runs[data.scatter.runs[run].row]);
}

// The points that no other point equals or beats in both quantities.
function frontOf(points) {
  const ways = byId("scatter-front").value.split(" ");
  if (ways.length < 2) return [];
  const sign = ways.map((way) => (way === "larger" ? -1 : 1));
  const key = (point) => [sign[0] * point.x, sign[1] * point.y];
  const ordered = [...points].sort((a, b) => key(a)[0] - key(b)[0] || key(a)[1] - key(b)[1]);
  let best = Infinity;
  return ordered.filter((point) => {
    const beats = key(point)[1] < best;
    if (beats) best = key(point)[1];
    return beats;
  });
}

function placeOf(point) {
  if (point.step === null) return "whole run";
  if (Number.isInteger(point.step)) return `step ${number(point.step, 7)}`;
  return `about step ${number(point.step, 4)} (interpolated)`;
}

function classOf(run) {
  const about = data.scatter.runs[run];
  return `${colour(about.kin)} s${about.shade % 3}`;
}

function drawRun(run, shape) {
  const points = plot.points.filter((point) => point.run === run);
  const group = drawn("g", { class: classOf(run), "data-run": run });
  const at = points.map((point) => [shape.x(point.x), shape.y(point.y)]);
  if (at.length > 1) group.append(drawn("path", { d: `M${at.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`, class: "stroke thin" }));
  at.forEach(([x, y], i) => group.append(mark(run, x, y, points[i].last)));
  return group;
}

function drawTip(point, shape, width, height) {
  const about = data.scatter.runs[point.run];
  const label = about.label.length > 34 ? `${about.label.slice(0, 33)}…` : about.label;
  const lines = [label, [about.seed, placeOf(point)].filter(Boolean).join(", "), `x ${number(point.x, 5)}`, `y ${number(point.y, 5)}`];
  const text = drawn("text", {}, ...lines.map((line, i) => drawn("tspan", { x: 0, dy: i ? 16 : 0 }, line)));
  const group = drawn("g", { class: "tip" }, text);
  byId("scatter").querySelector("svg").append(group);
  const box = text.getBBox();
  group.prepend(drawn("rect", { x: box.x - 7, y: box.y - 5, width: box.width + 14, height: box.height + 10, rx: 4 }));
  const [x, y] = [shape.x(point.x), shape.y(point.y)];
  const left = x + box.width + 30 < width ? x + 18 : Math.max(9, x - box.width - 18);
  const top = Math.min(Math.max(y - 20, 20), height - box.height + 8);
  group.setAttribute("transform", `translate(${left.toFixed(1)} ${top.toFixed(1)})`);
  group.before(drawn("g", { class: classOf(point.run) }, drawn("circle", { cx: x, cy: y, r: 8, class: "ring" })));
}

function plotShape(width, height, logX, logY) {
  const axis = (values, range, log) => {
    const [low, high] = extent(values, log);
    const room = (high - low) * 0.06;
    return scale(log ? [low / 1.12, high * 1.12] : [low - room, high + room], range, log);
  };
  return {
    x: axis(plot.points.map((point) => point.x), [MARGIN.left, width - MARGIN.right], logX),
    y: axis(plot.points.map((point) => point.y), [height - MARGIN.bottom, MARGIN.top], logY),
  };
}

function renderScatter() {
  const [x, y] = [quantity("x"), quantity("y")];
  const onWay = byId("scatter-way").checked;
  plot.points = visibleRuns().flatMap(pointsOf).filter((point) => onWay || point.last);
  for (const axis of ["x", "y"]) byId(`scatter-log-${axis}`).disabled = plot.points.some((point) => point[axis] <= 0);
  const [logX, logY] = ["x", "y"].map((axis) => byId(`scatter-log-${axis}`).checked && !byId(`scatter-log-${axis}`).disabled);
  plot.front = frontOf(plot.points);
  const box = byId("scatter");
  const width = Math.max(260, box.clientWidth), height = Math.round(Math.min(460, Math.max(280, width * 0.56)));
  const shape = plotShape(width, height, logX, logY);
  plot.shape = shape;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  svg.append(axes(shape, width, height, { x_label: axisName(x), y_label: axisName(y) }));
  if (plot.front.length > 1) {
    svg.append(drawn("path", { d: `M${plot.front.map((point) => `${shape.x(point.x).toFixed(1)} ${shape.y(point.y).toFixed(1)}`).join("L")}`, class: "front" }));
  }
  svg.append(...visibleRuns().map((run) => drawRun(run, shape)));
  box.replaceChildren(svg);
  const runs = new Set(plot.points.map((point) => point.run)).size;
  const title = `${nameOf(y)} against ${nameOf(x)}`;
  byId("scatter-title").textContent = title;
  byId("scatter-note").textContent = plot.points.length ? "" : "No run has both at the same step.";
  box.setAttribute("aria-label", `Scatter plot: ${title}. ${plot.points.length} points of ${runs} runs${plot.front.length ? `, ${plot.front.length} on the Pareto front` : ""}.`);
  renderPoint(width, height);
  renderPoints();
}

function axisName(one) {
  const name = one.title.length > 42 ? `${one.title.slice(0, 41)}…` : one.title;
  return one.group === "Cost" && one.unit ? `${name} (${one.unit})` : name;
}

function renderPoint(width, height) {
  const point = plot.points[plot.at];
  byId("scatter-readout").textContent = "";
  if (!point) return;
  drawTip(point, plot.shape, width, height);
  const about = data.scatter.runs[point.run];
  const where = [about.label, about.seed, placeOf(point)].filter(Boolean).join(", ");
  const onFront = plot.front.includes(point) ? ", on the Pareto front" : "";
  byId("scatter-readout").textContent = `${where}: ${nameOf(quantity("x"))} ${number(point.x, 5)}, ${nameOf(quantity("y"))} ${number(point.y, 5)}${onFront}`;
}

function renderPoints() {
  const holder = byId("scatter-data");
  if (!holder.open) return;
  const heads = ["Run", "Step", nameOf(quantity("x")), nameOf(quantity("y")), ...(plot.front.length ? ["Pareto front"] : [])];
  holder.querySelector("thead").replaceChildren(element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head))));
  holder.querySelector("tbody").replaceChildren(...plot.points.map((point) => {
    const cells = [placeOf(point), number(point.x, 5), number(point.y, 5), ...(plot.front.length ? [plot.front.includes(point) ? "yes" : ""] : [])];
    return element("tr", {}, element("th", { scope: "row" }, data.scatter.runs[point.run].label), ...cells.map((cell) => element("td", {}, cell)));
  }));
}

function pointAt(event) {
  const box = byId("scatter").getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const far = plot.points.map((point) => Math.hypot(plot.shape.x(point.x) - x, plot.shape.y(point.y) - y));
  const near = far.indexOf(Math.min(...far));
  const found = far[near] < 40 ? near : null;
  if (found === plot.at) return;
  plot.at = found;
  renderScatter();
}

function keyPoint(event) {
  // from left to right, as the points lie in the plot
  const order = plot.points.map((_, i) => i).sort((a, b) => plot.points[a].x - plot.points[b].x || plot.points[a].y - plot.points[b].y);
  const now = order.indexOf(plot.at);
  const target = { ArrowLeft: Math.max(0, now - 1), ArrowRight: Math.min(order.length - 1, now + 1), Home: 0, End: order.length - 1 }[event.key];
  if (event.key === "Escape") plot.at = null;
  else if (target === undefined || !order.length) return;
  else plot.at = order[target];
  event.preventDefault();
  renderScatter();
}

function chooseQuantities() {
  plot.at = null;
  const better = [quantity("x").better, quantity("y").better];
  byId("scatter-front").value = better.every(Boolean) ? better.join(" ") : "";
  renderScatter();
}

function buildScatterChoices() {
  const all = data.scatter.quantities;
  for (const axis of ["x", "y"]) {
    for (const group of new Set(all.map((one) => one.group))) {
      const options = element("optgroup", { label: group });
      all.forEach((one, index) => {
        if (one.group === group) options.append(element("option", { value: index }, nameOf(one)));
      });
      byId(`scatter-${axis}`).append(options);
    }
    byId(`scatter-${axis}`).addEventListener("change", chooseQuantities);
  }
  byId("scatter-front").append(...FRONTS.map(([value, label]) => element("option", { value }, label)));
  const loss = Math.max(0, all.findIndex((one) => one.name === "validation_loss"));
  const other = all.findIndex((one) => one.name.endsWith("/sharpness"));
  byId("scatter-x").value = loss;
  byId("scatter-y").value = other >= 0 ? other : all.findIndex((_, index) => index !== loss);
}

function startScatter() {
  if (data.scatter.quantities.length < 2) {
    byId("scatter-section").replaceChildren();
    return;
  }
  data.scatter.runs.forEach((about, run) => {
    if (about.label === undefined) return;
    const sign = drawn("svg", { class: `swatch ${classOf(run)}`, viewBox: "0 0 32 12", "aria-hidden": "true" }, drawn("path", { d: "M1 6H31", class: "stroke" }), mark(run, 16, 6, true));
    byId("scatter-legend").append(element("span", { class: "key" }, sign, about.label, about.seed ? element("span", { class: "muted" }, ` ${about.seed}`) : ""));
  });
  buildScatterChoices();
  for (const id of ["scatter-front", "scatter-way", "scatter-log-x", "scatter-log-y"]) {
    byId(id).addEventListener("change", () => {
      plot.at = null;
      renderScatter();
    });
  }
  byId("scatter").addEventListener("pointermove", pointAt);
  byId("scatter").addEventListener("pointerdown", pointAt);
  byId("scatter").addEventListener("keydown", keyPoint);
  byId("scatter-data").addEventListener("toggle", renderPoints);
  new ResizeObserver(() => renderScatter()).observe(byId("scatter"));
  chooseQuantities();
}
