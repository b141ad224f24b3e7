"use strict";
// Sorts a table's rows by a column: a click, Enter or Space on the button in the column's header.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const key = (row, column) => {
    const { value } = row.cells[column].dataset;
    return value === undefined ? row.cells[column].textContent.trim() : value === "" ? null : Number(value);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    const name = head.firstElementChild;
    button.type = "button";
    name.replaceWith(button);
    button.append(name);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const first = head.dataset.first || "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      heads.forEach((each) => each.setAttribute("aria-sort", each === head ? order : "none"));
      const sense = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      rows.sort(([one], [other]) => {
        if (one === null || other === null) return (one === null) - (other === null);  // empty cells stay below
        return sense * (typeof one === "number" ? one - other : one.localeCompare(other, "en", { numeric: true }));
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
