const STEPS = { ArrowLeft: -1, ArrowRight: 1 };
const OWN_KEYS = "input, select, textarea, [contenteditable], .noUi-handle, .jp-CodeMirrorEditor";

function render({ model, el }) {
  let home = null, later = null;
  const put = (values) => { for (const [k, v] of Object.entries(values)) model.set(k, v); model.save_changes(); };
  const isDark = () => document.body.dataset.jpThemeLight === "false";
  const theme = () => { if (isDark() !== model.get("dark")) put({ dark: isDark() }); };
  const keys = (event) => {
    const step = STEPS[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.target.closest(OWN_KEYS)) return;
    event.preventDefault(); event.stopPropagation();
    put({ steps: model.get("steps") + step });
  };
  const quiet = (event) => {        // notebook 80 says why
    const plot = event.target.closest(".js-plotly-plot");
    for (const name of ["plotly_hover", "plotly_unhover"]) plot?.removeAllListeners?.(name);
  };
  const focus = (event) => {        // of the mouse, not of a key on a button; after JupyterLab, which gives the focus to the cell
    if (event.detail > 0 && !event.target.closest(OWN_KEYS)) setTimeout(() => home.focus({ preventScroll: true }), 0);
  };
  const measure = () => {           // once the page has come to rest; what is hidden has no width
    clearTimeout(later);
    later = setTimeout(() => { if (home.clientWidth && home.clientWidth !== model.get("width")) put({ width: home.clientWidth }); }, 200);
  };
  const attach = () => {
    home = el.closest(".rlar-explorer");
    if (!home) { if (tries-- > 0) setTimeout(attach, 50); return; }
    home.tabIndex = 0;
    home.addEventListener("keydown", keys, true); home.addEventListener("click", focus); home.addEventListener("mouseover", quiet, true);
    space.observe(home);
  };
  let tries = 100;
  const space = new ResizeObserver(measure);
  const observer = new MutationObserver(theme);
  observer.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  theme(); attach();
  return () => {
    observer.disconnect(); space.disconnect(); clearTimeout(later); tries = 0;
    home?.removeEventListener("keydown", keys, true); home?.removeEventListener("click", focus); home?.removeEventListener("mouseover", quiet, true);
  };
}
export default { render };
