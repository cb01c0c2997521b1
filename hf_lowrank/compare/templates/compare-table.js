const table = { sort: data.sort, descending: data.descending, filter: "", differences: data.baseline !== null, turned: data.rows.length <= 6 };

function haystack(row) {
  return [row.label, row.method, row.seeds, row.text].join(" ").toLowerCase();
}

function chosenRows() {
  const words = table.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = data.rows.map((_, index) => index).filter((index) => {
    return shown.runs[index] && words.every((word) => haystack(data.rows[index]).includes(word));
  });
  if (table.sort === null) return rows;
  const way = table.descending ? -1 : 1;
  if (table.sort === "name") return rows.sort((a, b) => way * data.rows[a].label.localeCompare(data.rows[b].label, "en"));
  const key = (index) => (data.cells[index][table.sort] || { v: null }).v;
  return rows.sort((a, b) => {
    if (key(a) === null || key(b) === null) return (key(a) === null) - (key(b) === null);
    return way * (key(a) - key(b));
  });
}

function sortBy(column) {
  table.descending = table.sort === column && !table.descending;
  table.sort = column;
  renderTable();
  const again = byId("table").querySelector(`[data-column="${column}"] button`);
  if (again) again.focus();
}

function headerCell(column, label, detail, group, scope = "col") {
  const sorted = table.sort === column ? (table.descending ? "descending" : "ascending") : "none";
  const button = element("button", { type: "button" }, label);
  button.addEventListener("click", () => sortBy(column));
  const cell = element("th", { scope, "aria-sort": sorted, "data-column": column });
  if (group) cell.append(element("span", { class: "group" }, group));
  cell.append(button);
  if (detail) cell.append(element("span", { class: "sub" }, detail));
  return cell;
}

function runCell(index, scope) {
  const row = data.rows[index];
  const cell = element("th", { scope, class: scope === "col" && index === data.baseline ? "base" : null }, swatch(index), element("span", { class: "name" }, row.label));
  const about = [row.method, row.seeds ? `seed ${row.seeds}` : ""].filter(Boolean).join(", ");
  cell.append(element("span", { class: "sub" }, index === data.baseline ? `${about}, baseline` : about));
  if (row.place) cell.append(element("span", { class: "sub" }, row.place));
  if (table.differences && row.tested) cell.append(element("span", { class: "sub" }, row.tested));
  if (row.differs.length) cell.append(element("span", { class: "differs" }, `≠ ${row.differs.join(", ")}`));
  return cell;
}

function valueCell(cell, column) {
  // on paper a table of many columns becomes a list a run, and each number carries its metric's name
  const named = [data.columns[column].id, data.columns[column].label, data.columns[column].detail];
  const label = named.filter(Boolean).join(" ");
  if (!cell) return element("td", { class: "none" }, element("span", { class: "hidden" }, "not measured"));
  const made = element("td", { "data-label": label }, cell.t);
  if (table.differences && cell.d) {
    made.append(element("span", { class: "sub", title: cell.w || null }, cell.s ? `${cell.d} ${cell.s}` : cell.d));
  }
  if (cell.n) made.append(element("span", { class: "sub" }, cell.n));
  return made;
}

function nameOfColumn(column) {
  return column.id ? `${column.id} ${column.label}` : column.label;
}

// a line for each run, a column for each metric
function runsDown(rows, columns) {
  const head = element("tr", {}, headerCell("name", "Run", "", ""));
  for (const index of columns) {
    const column = data.columns[index];
    head.append(headerCell(index, nameOfColumn(column), column.detail, column.group));
  }
  const lines = rows.map((index) => {
    const line = element("tr", { class: index === data.baseline ? "base" : null }, runCell(index, "row"));
    line.append(...columns.map((column) => valueCell(data.cells[index][column], column)));
    return line;
  });
  return [head, lines];
}

// a column for each run, a line for each metric, family by family
function runsAcross(rows, columns) {
  const head = element("tr", {}, headerCell("name", "Run", "", ""), ...rows.map((index) => runCell(index, "col")));
  const lines = [];
  let group = null;
  for (const index of columns) {
    const column = data.columns[index];
    if (column.group !== group) {
      group = column.group;
      lines.push(element("tr", { class: "family" }, element("th", { scope: "rowgroup", colspan: rows.length + 1 }, group)));
    }
    const line = element("tr", {}, headerCell(index, nameOfColumn(column), column.detail, "", "row"));
    for (const row of rows) {
      const cell = valueCell(data.cells[row][index], index);
      if (row === data.baseline) cell.classList.add("base");
      line.append(cell);
    }
    lines.push(line);
  }
  return [head, lines];
}

function renderTable() {
  const columns = data.columns.map((_, index) => index).filter((index) => shown.columns[index]);
  const rows = chosenRows();
  const [head, lines] = (table.turned ? runsAcross : runsDown)(rows, columns);
  byId("table").classList.toggle("turned", table.turned);
  byId("table").tHead.replaceChildren(head);
  byId("table").tBodies[0].replaceChildren(...lines);
  byId("status").textContent = describeTable(rows.length);
  byId("metric-count").textContent = `(${columns.length} of ${data.columns.length} shown)`;
}

function describeTable(count) {
  const order = table.sort === null ? "as given" : `by ${sortLabel()}, ${table.descending ? "descending" : "ascending"}`;
  return `${count} of ${data.rows.length} ${data.rows.length === 1 ? "run" : "runs"}, ${order}`;
}

function sortLabel() {
  if (table.sort === "name") return "name";
  const column = data.columns[table.sort];
  return column.detail ? `${column.label} (${column.detail})` : column.label;
}

function buildMetricChoice() {
  for (const group of new Set(data.columns.map((column) => column.group))) {
    const choices = element("div", { class: "choices" });
    data.columns.forEach((column, index) => {
      if (column.group !== group) return;
      const change = (on) => {
        shown.columns[index] = on;
        renderTable();
      };
      const label = element("span", {}, nameOfColumn(column));
      if (column.settings) label.append(element("span", { class: "sub" }, column.settings));
      const choice = checkbox(column.shown, change, label);
      choice.dataset.columnChoice = index;
      choices.append(choice);
    });
    byId("metric-choice").append(element("fieldset", {}, element("legend", {}, group), choices));
  }
}

function chooseMetrics(wanted) {
  data.columns.forEach((column, index) => {
    shown.columns[index] = wanted(column, index);
    document.querySelector(`[data-column-choice="${index}"] input`).checked = shown.columns[index];
  });
  renderTable();
}

function buildMetricButtons() {
  const choices = [["Usual metrics", (column) => column.shown], ["All", () => true], ["None", () => false]];
  const buttons = choices.map(([label, wanted]) => {
    const button = element("button", { type: "button", class: "plain" }, label);
    button.addEventListener("click", () => chooseMetrics(wanted));
    return button;
  });
  byId("metric-choice").append(element("div", { class: "tools" }, ...buttons));
}

function startTable() {
  buildMetricButtons();
  buildMetricChoice();
  byId("filter").addEventListener("input", (event) => {
    table.filter = event.target.value;
    renderTable();
  });
  byId("turned").checked = table.turned;
  byId("turned").addEventListener("change", (event) => {
    table.turned = event.target.checked;
    renderTable();
  });
  if (data.baseline !== null) {
    byId("differences-field").hidden = false;
    byId("differences-field").querySelector("span").textContent = `Differences to ${data.rows[data.baseline].label}`;
    byId("differences").addEventListener("change", (event) => {
      table.differences = event.target.checked;
      renderTable();
    });
  }
  renderTable();
}
