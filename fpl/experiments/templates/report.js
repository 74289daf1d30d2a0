// A click on the header of a column sorts its table: up, down, and back as it was.
const NEXT = { none: "ascending", ascending: "descending", descending: "none" };
const number = text => parseFloat(text.replaceAll(",", "").replace("−", "-"));
const byNumber = (a, b) => number(a) - number(b);
const byWord = (a, b) => a.localeCompare(b, "en", { numeric: true });

for (const table of document.querySelectorAll("table:has(button)")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
    const order = NEXT[head.getAttribute("aria-sort")];
    heads.forEach(other => other.setAttribute("aria-sort", other === head ? order : "none"));
    const compare = head.className === "n" ? byNumber : byWord;
    const text = row => row.cells[i].textContent.trim();
    const gapsLast = (a, b) => (text(a) === "–") - (text(b) === "–");
    const up = (a, b) => gapsLast(a, b) || compare(text(a), text(b));
    const down = (a, b) => gapsLast(a, b) || compare(text(b), text(a));
    const sorted = { none: rows, ascending: [...rows].sort(up), descending: [...rows].sort(down) };
    body.append(...sorted[order]);
  }));
}
