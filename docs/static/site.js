// Marks pictures and tables that are wider than the screen: site.css says under them that they can be scrolled.
function markWide() {
  for (const box of document.querySelectorAll("article .cell_output, article p, article .table-wrapper"))
    box.classList.toggle("is-wide", box.scrollWidth > box.clientWidth + 1);
}
addEventListener("load", markWide);
addEventListener("resize", markWide);
