/* Draws the strategies that lie in the value of their gr.HTML, and again when it changes; Gradio runs this with the
   component's `element`, `props` and `watch`. */
const { element: make, format } = window.SpeedCharts;
const draw = () => {
  if (!props.value) return; // as the page opens
  const host = element.querySelector(".strategies");
  const { curves, coordinate } = JSON.parse(props.value);
  host.replaceChildren();
  const look = ({ name }) => {
    const index = curves.strategies.findIndex((each) => each.name === name);
    // The later, the thinner, so that equal curves show all their colours.
    const width = Math.max(1.3, 3.4 - (2.1 * index) / Math.max(1, curves.strategies.length - 1));
    return { name, color: `var(--run-${index % 8})`, dash: ["", "7 4"][Math.floor(index / 8) % 2], width };
  };
  const keys = make("div", host, { className: "keys" });
  for (const each of curves.strategies) {
    const key = make("span", keys), line = make("i", key, { className: "chart-key" });
    line.style.borderColor = look(each).color;
    key.append(each.name);
  }
  const names = ["density", "weight", "product", "noise"];
  window.SpeedStrategies.panels(make("div", host, { className: "cards" }), names, () => ({ groups: [curves], coordinate, look }));
  const table = make("table", make("div", host, { className: "scroll" }));
  const head = make("tr", make("thead", table));
  const areas = curves.areas.map((area) => `${area.name} ${area.timesteps[0]}\u2013${area.timesteps[1] - 1}`);
  for (const name of ["share of the draws in", ...areas, "mean weight", "mean log SNR"]) make("th", head, {}, name);
  const body = make("tbody", table);
  for (const each of curves.strategies) {
    const row = make("tr", body);
    make("td", row, {}, each.name);
    for (const area of curves.areas) make("td", row, {}, `${(100 * each.shares[area.name]).toFixed(1)} %`);
    make("td", row, {}, format(each.mean_weight));
    make("td", row, {}, window.SpeedStrategies.meanOf(each));
  }
};
watch("value", draw);
draw();
