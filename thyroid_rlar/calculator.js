// The ACR calculator's face, for JupyterLab (anywidget) and for pages without a kernel; nbs/79_calculator.ipynb makes `rule` from tirads.py.
// The state is what has been chosen: {composition, echogenicity, shape, margin, foci, size_mm, target}; null is not chosen, not known.

function score(rule, d) {
  if (!d.composition || !d.echogenicity) return null;
  const none = rule.zero.includes(d.composition);
  const single = rule.single.map(name => none ? 0 : rule.points[name][d[name]]);
  const by = [...single, none ? 0 : d.foci.reduce((sum, kind) => sum + rule.points.foci[kind], 0)];
  const points = by.reduce((a, b) => a + b, 0);
  return { by, points, level: rule.levels[points] };
}

function choices(rule, d, name) {     // [number of changes, the changes in words, the new value]
  if (name === "foci") {
    const flips = rule.kinds.reduce((sets, kind) => sets.flatMap(some => [some, [...some, kind]]), [[]]);
    return flips.map(some => [some.length, some.map(kind => `${d.foci.includes(kind) ? "no" : "add"} ${kind}`),
      [...d.foci.filter(kind => !some.includes(kind)), ...some.filter(kind => !d.foci.includes(kind))]]);
  }
  const others = rule.equals[name].filter(terms => rule.points[name][terms[0]] !== rule.points[name][d[name]]);
  return [[0, [], d[name]], ...others.map(terms => [1, [`${name} ${terms.join(" or ")}`], terms[0]])];
}

function ways(rule, d, target) {      // the smallest changes that lead to a level
  let found = [], least = Infinity;
  const names = [...rule.single, "foci"], options = names.map(name => choices(rule, d, name));
  const visit = (k, cost, edits, made) => {
    if (cost > least) return;
    if (k < names.length) return options[k].forEach(([n, words, value]) => visit(k + 1, cost + n, [...edits, ...words], { ...made, [names[k]]: value }));
    const { level, points } = score(rule, made);
    const liquid = cost && made.echogenicity === "anechoic" && !rule.zero.includes(made.composition);
    if (level !== target || liquid) return;
    if (cost < least) [found, least] = [[], cost];
    found.push({ edits, points });
  };
  visit(0, 0, [], {});
  return found;
}

function advice(rule, level, size) {
  const fna = rule.fna_mm[level], follow = rule.follow_mm[level];
  if (!fna) return `${level}: no FNA and no follow-up at any size.`;
  const at = `${level}: FNA from ${fna} mm, follow-up from ${follow} mm.`;
  if (!size) return `Size not known, so no advice. ${at}`;
  return `At ${size} mm: ${size >= fna ? "FNA" : size >= follow ? "follow-up" : "neither FNA nor follow-up"}. ${at}`;
}

function make(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

const WORDS = { macro: "macrocalcifications", rim: "rim calcification", punctate: "punctate echogenic foci", "comet-tail": "large comet tails" };

// Controls that stay in the page while the state changes, and how they follow it: an answer from the kernel must not take the words out of the user's hand.
function form(rule, change) {
  const follow = [];
  const select = name => {
    const terms = Object.entries(rule.points[name]).map(([term, p]) => make("option", { value: term, textContent: `${term} (${p})` }));
    const control = make("select", { name, onchange: () => change({ [name]: control.value }) },
      make("option", { value: "", textContent: "choose …", disabled: true, hidden: true }), ...terms);
    follow.push(d => { control.value = d[name] ?? ""; });
    return control;
  };
  const tick = kind => {
    const control = make("input", { type: "checkbox", name: kind, onchange: () => change({ [kind]: control.checked }) });
    follow.push(d => { control.checked = d.foci.includes(kind); });
    return make("label", { className: "tick" }, control, ` ${WORDS[kind]} (${rule.points.foci[kind]})`);
  };
  const size = make("input", { type: "number", name: "size_mm", min: "0.1", step: "0.1", placeholder: "not known",
    oninput: () => { const mm = Number(size.value); change({ size_mm: mm > 0 ? mm : null }); } });
  follow.push(d => { if (size !== document.activeElement) size.value = d.size_mm ?? ""; });
  const box = make("div", { className: "form" }, ...rule.single.map(name => make("label", {}, make("span", { textContent: name }), select(name))),
    make("fieldset", {}, make("legend", { textContent: "echogenic foci, all that apply" }), ...Object.keys(WORDS).map(tick)),
    make("label", {}, make("span", { textContent: "largest diameter (mm)" }), size));
  return [box, d => follow.forEach(one => one(d))];
}

function result(rule, d, change) {
  const s = score(rule, d), box = make("div", { className: "result" });
  if (!s) { box.append(make("p", { textContent: "Choose composition and echogenicity: both are needed for points." })); return box; }
  const names = [...rule.single, "foci"];
  const row = (name, p) => make("tr", {}, make("th", { textContent: name }), make("td", { textContent: p }),
    make("td", {}, make("i", { className: "bar", style: `width: ${0.8 * p}rem` })));
  box.append(make("p", {}, make("strong", { className: "level", textContent: s.level }), ` ${s.points} point${s.points === 1 ? "" : "s"}`),
    make("table", {}, ...names.map((name, k) => row(name, s.by[k]))), make("p", { className: "advice", textContent: advice(rule, s.level, d.size_mm) }));
  if (rule.zero.includes(d.composition)) box.append(make("p", { className: "note", textContent: `A ${d.composition} nodule scores 0 in all.` }));
  else if (d.echogenicity === "anechoic") box.append(make("p", { className: "note", textContent: "Anechoic is meant for cystic nodules." }));
  const button = level => make("button", { type: "button", name: level, textContent: level, ariaPressed: String(level === d.target),
    onclick: () => change({ target: level === d.target ? null : level }) });
  box.append(make("div", { className: "targets" }, make("span", { textContent: "What would make it" }), ...rule.grades.map(button)));
  if (!d.target) return box;
  const found = ways(rule, d, d.target), n = found[0].edits.length;
  const title = n ? `${d.target} by ${n} change${n > 1 ? "s" : ""}, any one of:` : `It is ${d.target}.`;
  const way = ({ edits, points }) => make("li", { textContent: `${edits.join(", ")} (${points} point${points === 1 ? "" : "s"})` });
  box.append(make("div", { className: "ways" }, make("p", { textContent: n && found.length === 1 ? title.replace("any one of", "namely") : title }),
    make("ul", {}, ...(n ? found.map(way) : []))));
  return box;
}

const STYLE = `
.acr { display: grid; grid-template-columns: minmax(17rem, 22rem) minmax(18rem, 1fr); gap: .6rem 2rem; max-width: 56rem; font: 14px/1.5 system-ui, sans-serif; }
.acr label { display: flex; gap: .6rem; align-items: center; margin: .3rem 0; } .acr label > span { flex: 0 0 10.5rem; }
.acr select, .acr input[type=number] { flex: 1; min-width: 0; font: inherit; color: inherit; padding: .2rem .3rem; border-radius: 4px;
  border: 1px solid color-mix(in srgb, currentColor 45%, transparent); background: color-mix(in srgb, currentColor 6%, transparent); }
.acr option { color: CanvasText; background: Canvas; }
.acr fieldset { border: 1px solid color-mix(in srgb, currentColor 30%, transparent); border-radius: 4px; margin: .5rem 0; padding: .2rem .7rem; }
.acr p { margin: .3rem 0; } .acr .level { font-size: 1.6rem; margin-right: .3rem; } .acr .note { border-left: 3px solid #D55E00; padding-left: .6rem; }
.acr table { border-collapse: collapse; } .acr th { text-align: left; font-weight: normal; padding: 0 1rem 0 0; } .acr td { padding: 0 .6rem 0 0; background: none; }
.acr .bar { display: block; height: .65rem; border-radius: 2px; background: #3A8FCF; }
.acr .targets { display: flex; flex-wrap: wrap; gap: .3rem; align-items: center; margin-top: .8rem; }
.acr button { font: inherit; color: inherit; padding: .1rem .6rem; border-radius: 4px; cursor: pointer; background: transparent;
  border: 1px solid color-mix(in srgb, currentColor 45%, transparent); }
.acr button[aria-pressed=true] { background: #0072B2; border-color: #0072B2; color: #fff; } .acr ul { margin: .2rem 0; padding-left: 1.2rem; }
.acr .ways { min-height: 7rem; }
@media (max-width: 42rem) { .acr { grid-template-columns: 1fr; } }
`;

function render({ model, el }) {
  const rule = model.get("rule"), answer = make("div", { className: "answer" });
  const change = some => {
    const d = { ...model.get("chosen") };
    for (const [name, value] of Object.entries(some))
      if (name in WORDS) d.foci = value ? [...d.foci, name] : d.foci.filter(kind => kind !== name);
      else d[name] = value;
    model.set("chosen", d);
    model.save_changes();
  };
  const [controls, follow] = form(rule, change);
  const draw = () => {
    const button = answer.contains(document.activeElement) ? document.activeElement.name : null;     // the keyboard stays where it was
    follow(model.get("chosen"));
    answer.replaceChildren(result(rule, model.get("chosen"), change));
    if (button) answer.querySelector(`[name="${button}"]`)?.focus();
  };
  model.on("change:chosen", draw);
  draw();
  el.append(make("style", { textContent: STYLE }), make("div", { className: "acr" }, controls, answer));
  return () => model.off("change:chosen", draw);
}

export default { render, score, ways, advice };
