const KINDS = ["addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate", "removeLayoutProps", "removeTraceProps"];
const scripts = (globalThis.thyroidRlarScripts ??= new Map());

async function load(manager, id) {
  const script = await manager.get_model(id);
  const url = URL.createObjectURL(new Blob([script.get("text")], { type: "text/javascript" }));
  try { return await import(url); } finally { URL.revokeObjectURL(url); }
}

function start(model, make, late) {
  const figure = make();
  figure.initialize({ model });
  for (const [name, value] of late) { model.set(name, value); model.set(name, null); }
  return figure;
}

export default () => {
  let figure = null;
  return {
    initialize({ model }) {
      const id = model.get("script").replace("IPY_MODEL_", ""), late = [];
      const heard = KINDS.map((kind) => `_py2js_${kind}`).map((name) => [name, () => { if (model.get(name)) late.push([name, model.get(name)]); }]);
      for (const [name, hear] of heard) model.on(`change:${name}`, hear);
      if (!scripts.has(id)) scripts.set(id, load(model.widget_manager, id));
      figure = scripts.get(id).then((plotly) => {
        for (const [name, hear] of heard) model.off(`change:${name}`, hear);
        return start(model, plotly.default, late);
      });
    },
    render: async (told) => (await figure).render(told),
  };
};
