/* Density, weight and their product of strategies, over log SNR or timesteps: for the page of a report and demo/app.py.
   What is shown are the curves of reports/strategy_curves.py. */
"use strict";
window.SpeedStrategies = (() => {
  const { element, line } = window.SpeedCharts;
  const PANELS = {
    density: ["Density", "How often a timestep is drawn.", (each, density) => density],
    weight: ["Loss weight", "What the squared error of a drawn timestep is multiplied by.", (each) => each.weight],
    noise: ["Noise level", "1 / (1 + SNR): where its change is fastest, deceleration begins.", null],
    product: ["Density × weight", "What a timestep counts in the expected loss.", (each, density) => density.map((value, index) => value * each.weight[index])],
  };
  const UNITS = { log_snr: "Per unit of log SNR.", timesteps: "Relative to uniform draws." };
  const X = {
    log_snr: { label: "log SNR (much noise on the right)", name: "log SNR", reverse: true },
    timesteps: { label: "timestep (0: least noise)", name: "timestep" },
  };

  const bands = (group, coordinate) => group.areas.map((area) => ({ name: area.name, from: area[coordinate][0], to: area[coordinate][1] }));

  /* Mean and deviation of log SNR under the draws. */
  const meanOf = ({ log_snr: [mean, deviation] }) => `${mean.toFixed(2).replace(/^-0\.00$/, "0.00").replace("-", "−")} ± ${deviation.toFixed(2)}`;

  /* Cards with the panels that are named. read() gives what to draw: groups, the coordinate, look(strategy) with name,
     colour and dash, or null for a strategy that is hidden, and dots(strategy, coordinate) with what was really drawn, or
     null. Returns a function that draws them again. */
  function panels(parent, names, read) {
    const updates = names.map((key) => {
      const [name, text, pick] = PANELS[key];
      const card = element("figure", parent, { className: "card" });
      card.dataset.chart = name;
      element("h3", card, {}, name);
      const words = element("p", card);
      const update = line(element("div", card), null);
      return () => {
        const { groups, coordinate, look, dots } = read();
        const perUnit = key === "density" || key === "product";
        words.textContent = perUnit ? `${text} ${UNITS[coordinate]}` : text;
        const curves = (group) => group.strategies.flatMap((each) => {
          const style = look(each);
          if (!style) return [];
          const density = coordinate === "log_snr" ? each.density_over_log_snr : each.density;
          const curve = { ...style, x: group[coordinate], y: pick(each, density) };
          const found = key === "density" && dots ? dots(each, coordinate) : null;
          return found ? [curve, { ...style, ...found, kind: "dots", faint: true }] : [curve];
        });
        const noise = (group) => [{ name: "noise level", color: "var(--chart-muted)", x: group[coordinate], y: group.noise_level }];
        const steep = perUnit || key === "weight" ? groups.some((group) => group.axes[key][0] === "log") : false;
        update({
          label: name, height: 250, x: X[coordinate], empty: "nothing is shown",
          y: { log: steep && !(key === "density" && coordinate === "log_snr"), zero: true },
          series: groups.flatMap(key === "noise" ? noise : curves),
          bands: groups.length === 1 ? bands(groups[0], coordinate) : [],
        });
      };
    });
    const refresh = () => updates.forEach((update) => update());
    refresh();
    return refresh;
  }

  return { bands, meanOf, panels };
})();
