// A heat map as a table that the keyboard walks: one tab stop, arrow keys move, Space or Enter acts.
"use strict";

// rows: [{label, title, cells: [{level, text, name, classes, selected}]}]; level in [0, 1] or null (no value); name is what a screen
// reader says. columns: heads of the columns, or null. onFocus(row, column) also on hover; onAct(row, column) where cells do something.
function makeGrid(container, { label, rows, columns, onFocus, onAct }) {
  const table = document.createElement("table");
  table.className = "heat";
  table.setAttribute("role", "grid");
  table.setAttribute("aria-label", label);
  if (!onAct) table.setAttribute("aria-readonly", "true");
  table.style.setProperty("--columns", Math.max(1, ...rows.map((row) => row.cells.length)));
  if (columns) table.append(headRow(columns));
  const body = table.createTBody();
  const cells = rows.map((row) => appendRow(body, row));
  container.replaceChildren(table);
  const lengths = cells.map((row) => row.length);
  const current = { row: Math.max(0, lengths.findIndex(Boolean)), column: 0 };
  if (lengths.some(Boolean)) cells[current.row][0].tabIndex = 0;

  function moveTo(row, column) {
    const next = cells[row] && cells[row][column];
    if (!next) return;
    cells[current.row][current.column].tabIndex = -1;
    Object.assign(current, { row, column });
    next.tabIndex = 0;
    next.focus();
  }
  const placeOf = (target) => {
    const cell = target.closest && target.closest("td[data-column]");
    return cell && table.contains(cell) ? [Number(cell.dataset.row), Number(cell.dataset.column)] : null;
  };
  table.addEventListener("keydown", (event) => {
    const place = placeOf(event.target);
    if (!place) return;
    const next = Logic.nextCell(lengths, ...place, event.key, event.ctrlKey);
    if (next) moveTo(...next);
    else if (onAct && (event.key === " " || event.key === "Enter")) onAct(...place);
    else return;
    event.preventDefault();
  });
  table.addEventListener("click", (event) => {
    const place = placeOf(event.target);
    if (!place) return;
    moveTo(...place);
    if (onAct) onAct(...place);
  });
  for (const kind of ["mouseover", "focusin"]) {
    table.addEventListener(kind, (event) => {
      const place = placeOf(event.target);
      if (place && onFocus) onFocus(...place);
    });
  }
  return { update: (newRows) => newRows.forEach((row, r) => row.cells.forEach((cell, c) => paint(cells[r][c], cell))) };
}

function headRow(columns) {
  const head = document.createElement("thead");
  const row = head.insertRow();
  row.setAttribute("role", "row");
  for (const text of ["", ...columns]) {
    const cell = document.createElement("th");
    cell.setAttribute("role", "columnheader");
    cell.scope = "col";
    cell.textContent = text;
    row.append(cell);
  }
  return head;
}

function appendRow(body, row) {
  const line = body.insertRow();
  line.setAttribute("role", "row");
  const head = document.createElement("th");
  head.setAttribute("role", "rowheader");
  head.scope = "row";
  head.textContent = row.label;
  head.title = row.title;
  line.append(head);
  return row.cells.map((cell, column) => {
    const box = line.insertCell();
    box.setAttribute("role", "gridcell");
    box.dataset.row = line.sectionRowIndex;
    box.dataset.column = column;
    box.tabIndex = -1;
    return paint(box, cell);
  });
}

function paint(box, cell) {
  box.className = ["cell", ...(cell.classes || []), cell.level > 0.55 ? "strong" : "", cell.level === null ? "empty" : ""].join(" ").trim();
  if (cell.level !== null) box.style.setProperty("--level", `${Math.round(100 * cell.level)}%`);
  else box.style.removeProperty("--level");
  box.textContent = cell.text || "";
  box.setAttribute("aria-label", cell.name);
  if (cell.selected !== undefined) box.setAttribute("aria-selected", String(cell.selected));
  return box;
}
