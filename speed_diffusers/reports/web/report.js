/* The page of a report: builds every section from the data that lie in it. */
(() => {
  const { element, format, line, map, bar, range } = window.SpeedCharts;
  const { bands, meanOf, panels } = window.SpeedStrategies;
  const data = JSON.parse(document.getElementById("data").textContent);
  const { runs } = data;
  const AXES = { step: "optimizer steps", images: "images seen", seconds: "training time" };
  const BUTTONS = { step: "Steps", images: "Images", seconds: "Time" };
  const LOGGED = {
    loss: ["Training loss", "As each run draws and weighs its timesteps: it does not compare runs."],
    variance_bits: ["Variance term", "Bits per dimension."],
    grad_norm: ["Gradient norm", "Before clipping."],
    learning_rate: ["Learning rate", ""],
    images_per_second: ["Images per second", "Training alone; samples, scores and checkpoints are not counted."],
  };
  const LOWER = (name) => /lower is better/.test(data.scores.names[name] || "");
  const HIGHER = (name) => /higher is better/.test(data.scores.names[name] || "");
  const state = { axis: "step", shown: runs.map(() => true), coordinate: "log_snr", smoothing: 0, scale: "auto", at: Infinity };
  const listeners = [];
  const changed = () => listeners.forEach((listener) => listener());
  const colour = (index) => `var(--run-${index % 8})`;
  const dash = (index) => ["", "7 4", "2 3", "9 3 2 3"][Math.floor(index / 8) % 4];
  const visible = () => runs.map((_, index) => index).filter((index) => state.shown[index]);
  const known = (axis) => runs.every((run) => !run.log.step.length || run.log[axis].some((value) => value !== null));

  function duration(seconds, digits = 3) {
    if (seconds === null || seconds === undefined) return "–";
    if (seconds < 120) return `${format(seconds, digits)} s`;
    return seconds < 7200 ? `${format(seconds / 60, digits)} min` : `${format(seconds / 3600, digits)} h`;
  }

  const count = (value) => (value === null || value === undefined ? "–" : value < 1e6 ? Math.round(value).toLocaleString("en") : format(value, 4));
  const arrow = (name) => data.scores.names[name].replace(" (lower is better)", " ↓").replace(" (higher is better)", " ↑");
  const position = (value, digits) => (state.axis === "seconds" ? duration(value, digits) : format(value, digits));
  const xAxis = () => {
    if (state.axis !== "seconds") return { label: AXES[state.axis], name: AXES[state.axis], format };
    const longest = Math.max(...runs.map((run) => run.seconds || 0));
    const [unit, name] = longest < 120 ? [1, "seconds"] : longest < 7200 ? [60, "minutes"] : [3600, "hours"];
    return { unit, label: `training time in ${name}`, name: `after ${name}:`, format };
  };
  /* From nothing to the end of the longest run, the same on all panels. */
  const wholeTraining = () => [0, Math.max(1, ...runs.flatMap((run) => [run.log, run.validation].flatMap(along))) * 1.01];
  const along = (places) => {
    const unit = xAxis().unit || 1;
    return places[state.axis].map((value) => (value === null ? null : value / unit));
  };

  function section(id, short, name, lead) {
    const made = element("section", document.querySelector("main"), { id });
    element("h2", made, {}, name);
    if (lead) element("p", made, { className: "lead" }, lead);
    element("a", document.getElementById("sections"), { href: `#${id}` }, short);
    return made;
  }

  function card(parent, name, text) {
    const made = element("figure", parent, { className: "card" });
    const head = element("div", made, { className: "head" });
    element("h3", head, {}, name);
    if (text) element("p", made, {}, text);
    return made;
  }

  function choice(host, options, value, chosen) {
    host.className = "choice";
    host.setAttribute("role", "radiogroup");
    const buttons = Object.entries(options).map(([key, name]) => {
      const button = element("button", host, { type: "button" }, name);
      button.setAttribute("role", "radio");
      button.setAttribute("data-value", key);
      button.addEventListener("click", () => { mark(key); chosen(key); changed(); });
      return button;
    });
    const mark = (key) => buttons.forEach((button) => button.setAttribute("aria-checked", button.dataset.value === key));
    mark(value);
  }

  function chart(parent, name, text, make, kind = line) {
    const made = card(parent, name, text), host = element("div", made);
    made.dataset.chart = name;
    const update = kind(host, null);
    const refresh = () => {
      const spec = make();
      made.hidden = !spec;
      if (spec) update({ label: name, ...spec });
    };
    listeners.push(refresh);
    refresh();
    return made;
  }

  const dotted = (host, index) => Object.assign(element("span", host, { className: "dot" }).style, { background: colour(index) });

  function table(parent, heads, rows, className = "") {
    const made = element("table", element("div", parent, { className: "scroll" }), { className });
    const head = element("tr", element("thead", made));
    heads.forEach((name) => element("th", head, { scope: "col", className: /strategy$/.test(name) ? "left" : "" }, name));
    const body = element("tbody", made);
    rows.forEach((fill) => fill(element("tr", body)));
    return made;
  }

  // ---------------------------------------------------------------------------------------------------- the head

  function head() {
    document.title = data.title;
    document.getElementById("title").textContent = data.title;
    const theme = document.documentElement;
    theme.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    document.getElementById("theme").addEventListener("click", () => {
      theme.dataset.theme = theme.dataset.theme === "dark" ? "light" : "dark";
    });
    const chips = document.getElementById("runs");
    runs.forEach((run, index) => {
      const button = element("button", chips, { type: "button", title: run.name });
      dotted(button, index);
      element("span", button, {}, run.name);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        state.shown[index] = !state.shown[index];
        button.setAttribute("aria-pressed", state.shown[index]);
        changed();
      });
    });
    const axes = Object.fromEntries(Object.entries(BUTTONS).filter(([axis]) => known(axis)));
    choice(document.getElementById("axis"), axes, "step", (axis) => { state.axis = axis; state.at = Infinity; });
    document.querySelector("footer").textContent = `Made by speed_diffusers ${data.version}, train_scripts/report.py. Everything is in this file.`;
  }

  function overview() {
    const host = section("overview", "Overview", "Overview");
    const metrics = Object.keys(data.scores.names).filter((name) => LOWER(name) || HIGHER(name));
    const metric = metrics.includes("frechet_distance") ? "frechet_distance" : metrics[0];
    const score = (index) => data.scores.rows.filter((row) => row.run === index && row.protocol === mainProtocol() && row.values[metric] !== undefined).at(-1);
    const curves = runs.map((_, index) => data.strategies.flatMap((group) => group.strategies).find((each) => each.run === index));
    const columns = [
      ["run", (cell, run, index) => { dotted(cell, index); cell.append(run.name); element("small", cell, {}, `${run.model} · ${run.optimizer}`); }],
      ["strategy", (cell, run, index) => { cell.append(curves[index].strategy); element("small", cell, {}, data.targets.length > 1 ? run.target_words : ""); }],
      ["steps", (cell, run) => { cell.append(run.step.toLocaleString("en")); element("small", cell, {}, run.step < run.max_steps ? `of ${run.max_steps.toLocaleString("en")}` : "done"); }],
      ["images seen", (cell, run) => { cell.append(count(run.images)); element("small", cell, {}, run.global_batch ? `${format(run.global_batch)} per step` : ""); }],
      ["training time", (cell, run) => { cell.append(duration(run.seconds)); element("small", cell, {}, run.images_per_second ? `${format(run.images_per_second)} images/s` : ""); }],
      ["unweighted MSE", (cell, run) => { cell.append(format(run.mse, 4)); element("small", cell, {}, run.mse === null ? "" : "last fifth"); }],
      ["validation loss", (cell, run) => { cell.append(format(run.validation_loss, 4)); element("small", cell, {}, run.validation.loss.length ? `step ${format(run.validation.step.at(-1))}` : ""); }],
    ];
    if (metric && data.scores.rows.length) {
      columns.push([data.scores.names[metric].replace(/ \(.*/, ""), (cell, run, index) => {
        const row = score(index);
        cell.append(row ? format(row.values[metric], 4) : "–");
        element("small", cell, {}, row && row.step !== null ? `step ${format(row.step)}` : "");
      }]);
    }
    element("p", host, { className: "lead" }, data.targets.length > 1 ? "" : `All runs: ${data.targets[0]}.`);
    table(host, columns.map(([name]) => name), runs.map((run, index) => (row) => columns.forEach(([name, fill]) => fill(element("td", row, { className: name === "strategy" ? "left" : "" }), run, index))));
  }

  // -------------------------------------------------------------------------------------------------- the samples

  function samples() {
    if (!runs.some((run) => run.grids.length)) return;
    const host = section("samples", "Samples", "Samples over training", "The same noise and classes each time, from the EMA weights.");
    const player = element("div", host, { className: "player" });
    const play = element("button", player, { type: "button", ariaLabel: "Play" }, "▶");
    const slider = element("input", player, { type: "range", min: 0, step: 1, ariaLabel: "Point of the training" });
    const output = element("output", player);
    const cards = element("div", host, { className: "cards wide" });
    const figures = runs.map((run, index) => {
      if (!run.grids.length) return null;
      const figure = element("figure", cards, { className: "card samples" });
      const caption = element("figcaption", figure), name = element("span", caption);
      dotted(name, index);
      name.append(run.name);
      return { figure, where: element("span", caption), image: element("img", figure, { alt: `Samples of ${run.name}` }), none: element("div", figure, { className: "none" }, "no samples yet") };
    });
    let places = [], timer = null;
    const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶"; play.ariaLabel = "Play"; };
    const show = () => {
      state.at = places[slider.value];
      output.textContent = places.length ? `${AXES[state.axis]}: ${position(state.at)}` : "";
      slider.setAttribute("aria-valuetext", output.textContent);
      runs.forEach((run, index) => {
        if (!figures[index]) return;
        const { figure, image, none, where } = figures[index];
        const grid = run.grids.filter((each) => each[state.axis] <= state.at).at(-1);
        figure.hidden = !state.shown[index];
        image.hidden = !grid;
        none.hidden = Boolean(grid);
        where.textContent = grid ? `step ${grid.step.toLocaleString("en")}` : "";
        if (grid && image.src !== grid.url) image.src = grid.url;
      });
    };
    const refresh = () => {
      const found = visible().flatMap((index) => runs[index].grids.map((grid) => grid[state.axis]));
      places = [...new Set(found)].filter((value) => value !== null).sort((one, other) => one - other);
      slider.max = Math.max(0, places.length - 1);
      const at = places.findIndex((place) => place >= state.at);
      slider.value = at < 0 ? slider.max : at;
      show();
    };
    slider.addEventListener("input", () => { stop(); show(); });
    play.addEventListener("click", () => {
      if (timer) { stop(); return; }
      play.textContent = "❚❚";
      play.ariaLabel = "Pause";
      if (slider.value === slider.max) slider.value = 0;
      show();
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        show();
        if (slider.value === slider.max) stop();
      }, 700);
    });
    listeners.push(refresh);
    refresh();
  }

  // --------------------------------------------------------------------------------------------------- the curves

  function smoothed(values) {
    let [sum, weight] = [0, 0];
    return values.map((value) => {
      if (value === null) return null;
      sum = sum * state.smoothing + value * (1 - state.smoothing);
      weight = weight * state.smoothing + 1 - state.smoothing;
      return sum / weight;
    });
  }

  /* One line per run that is shown; with smoothing the plain one behind it. */
  function runLines(pick, { kind = "line", smooth = false } = {}) {
    return visible().flatMap((index) => {
      const found = pick(runs[index], index);
      if (!found || !found.y.some((value) => value !== null)) return [];
      const own = { name: runs[index].name, color: colour(index), dash: dash(index), kind, x: found.x, y: found.y };
      return smooth && state.smoothing ? [{ ...own, faint: true }, { ...own, y: smoothed(found.y) }] : [own];
    });
  }

  function curve(parent, name, text, pick, options) {
    if (!runs.some((run, index) => { const found = pick(run, index); return found && found.y.some((value) => value !== null); })) return;
    chart(parent, name, text, () => ({ x: { ...xAxis(), domain: wholeTraining() }, y: { log: { auto: "auto", linear: false, log: true }[state.scale] }, series: runLines(pick, options), empty: "no run is shown" }));
  }

  const mainProtocol = () => {
    const counts = data.scores.protocols.map((_, index) => data.scores.rows.filter((row) => row.protocol === index).length);
    return counts.indexOf(Math.max(...counts));
  };

  function curves() {
    if (!runs.some((run) => run.log.step.length || run.validation.step.length)) return;
    const host = section("curves", "Curves", "Curves", "What compares first: scores, the loss on held-out images, the error of every timestep alike.");
    const row = element("div", host, { className: "row-of" });
    choice(element("div", row, { ariaLabel: "Scale of the y axes" }), { auto: "Auto", linear: "Linear", log: "Log" }, "auto", (key) => { state.scale = key; });
    const label = element("label", row, {}, "Smoothing of logged numbers");
    const slider = element("input", label, { type: "range", min: 0, max: 0.98, step: 0.02, value: 0 });
    slider.addEventListener("input", () => { state.smoothing = Number(slider.value); changed(); });
    const cards = element("div", host, { className: "cards" });
    const protocol = mainProtocol();
    for (const [name, words] of Object.entries(data.scores.names)) {
      const pick = (_, index) => {
        const rows = data.scores.rows.filter((each) => each.run === index && each.protocol === protocol && each.step !== null);
        return { x: along(Object.fromEntries(Object.keys(AXES).map((axis) => [axis, rows.map((each) => each[axis])]))), y: rows.map((each) => each.values[name] ?? null) };
      };
      curve(cards, words.replace(/ \(.*/, "").replace(/^./, (first) => first.toUpperCase()), `${(words.match(/\((.*)\)/) || ["", ""])[1]}${data.scores.protocols.length > 1 ? "; under the protocol with the most scores" : ""}`.replace(/^./, (first) => first.toUpperCase()), pick, { kind: "marked" });
    }
    curve(cards, "Validation loss", "Held-out images at eight fixed noise levels, EMA weights; it compares whatever is predicted.", (run) => ({ x: along(run.validation), y: run.validation.loss }), { kind: "marked" });
    data.targets.forEach((words, target) => {
      const several = data.targets.length > 1 ? ` (${words})` : "";
      curve(cards, `Unweighted MSE${several}`, "Mean over all timesteps alike, of what was logged since the point before.", (run) => run.target === target && run.errors && { x: along(run.errors.mean), y: run.errors.mean.mse });
    });
    for (const [key, [name, text]] of Object.entries(LOGGED)) {
      curve(cards, name, text, (run) => run.log.values[key] && { x: along(run.log), y: run.log.values[key] }, { smooth: true });
    }
  }

  // --------------------------------------------------------------------------------------------------- the errors

  function errors() {
    if (!runs.some((run) => run.errors)) return;
    const host = section("errors", "Errors", "Errors by timestep", "Mean squared errors without loss weights: what compares runs that draw and weigh timesteps differently.");
    const cards = element("div", host, { className: "cards wide" });
    data.targets.forEach((words, target) => {
      const own = (index) => runs[index].errors && runs[index].target === target;
      const group = data.strategies[runs[runs.findIndex((run) => run.target === target)].process];
      if (!runs.some((_, index) => own(index))) return;
      chart(cards, "Over the last fifth of each run", `Unweighted MSE; ${words}.`, () => ({
        height: 260,
        x: { label: "timestep (0: least noise)", name: "timesteps from" },
        y: { log: true },
        bands: bands(group, "timesteps"),
        series: visible().filter(own).map((index) => ({ name: runs[index].name, color: colour(index), dash: dash(index), kind: "stairs", x: runs[index].errors.edges, y: runs[index].errors.last })),
        empty: "no run is shown",
      }));
    });
    const found = range(runs.flatMap((run) => run.validation.log_snr), false);
    if (found) {
      const levels = [found[0] - 0.5, found[1] + 0.5];
      chart(cards, "On held-out images, by noise level", "Squared error of the velocity that the prediction amounts to, at each run's last validation.", () => ({
        height: 260,
        x: { label: "log SNR (much noise on the right)", name: "log SNR", reverse: true, domain: levels },
        y: { log: "auto" },
        series: visible().map((index) => ({ name: runs[index].name, color: colour(index), dash: dash(index), kind: "marked", x: runs[index].validation.log_snr, y: runs[index].validation.by_log_snr })),
        empty: "no run is shown",
      }));
    }
    const domains = data.targets.map((_, target) => range(runs.filter((run) => run.errors && run.target === target).flatMap((run) => run.errors.map.flat()), true));
    runs.forEach((run, index) => {
      const domain = domains[run.target];
      if (!run.errors || !domain) return;
      const made = chart(cards, run.name, "Unweighted MSE over training and timesteps.", () => state.shown[index] && {
        height: 260,
        x: { label: "optimizer steps", name: "to step", edges: run.errors.steps },
        y: { label: "timestep", name: "timesteps", edges: run.errors.edges },
        values: run.errors.map, domain, name: "unweighted MSE", bands: bands(data.strategies[run.process], "timesteps"),
      }, map);
      const title = made.querySelector("h3");
      title.prepend(element("span", null, { className: "dot" }));
      title.firstChild.style.background = colour(index);
      bar(made.querySelector(".head"), domain, "MSE");
    });
  }

  // ----------------------------------------------------------------------------------------------- the strategies

  function strategies() {
    const host = section("strategies", "Timesteps", "What was drawn, and what it counted", "Density and loss weight of each run's timesteps; dots are what was really drawn. Over log SNR, strategies on different noise schedules compare.");
    const row = element("div", host, { className: "row-of" });
    choice(element("div", row, { ariaLabel: "Coordinate" }), { log_snr: "log SNR", timesteps: "Timesteps" }, "log_snr", (key) => { state.coordinate = key; });
    const groups = data.strategies;
    const all = groups.flatMap((group) => group.strategies).sort((one, other) => one.run - other.run);
    listeners.push(panels(element("div", host, { className: "cards" }), ["density", "weight", "product"], () => ({
      groups,
      coordinate: state.coordinate,
      look: ({ run }) => state.shown[run] && { name: runs[run].name, color: colour(run), dash: dash(run) },
      dots: ({ run }, coordinate) => drawnDots(runs[run], coordinate === "log_snr"),
    })));
    const names = [...new Set(groups.flatMap((group) => group.areas.map((area) => area.name)))];
    const heads = ["run", "its strategy", ...names.map((name) => `drawn in ${name}`), "tau", "mean weight", "mean log SNR"];
    element("p", host, { className: "note" }, groups.map((group) => `Areas (${group.words}): ${group.areas.map((area) => `${area.name} ${area.timesteps[0]}–${area.timesteps[1] - 1}`).join(", ")}.`).join(" "));
    const wrap = element("div", host);
    wrap.style.marginTop = "12px";
    table(wrap, heads, all.map((each) => (row) => {
      const first = element("td", row);
      dotted(first, each.run);
      first.append(runs[each.run].name);
      const second = element("td", row, { className: "left" }, each.strategy);
      const words = each.learns ? "loss-aware: shown as it begins" : each.changes ? "changes in training: shown as it begins" : each.draw === "independent" ? "" : `${each.draw} draws`;
      if (words) element("small", second, {}, words);
      names.forEach((name) => element("td", row, {}, each.shares[name] === undefined ? "–" : `${(100 * each.shares[name]).toFixed(1)} %`));
      element("td", row, {}, String(each.tau));
      element("td", row, {}, format(each.mean_weight));
      element("td", row, {}, meanOf(each));
    }));
  }

  /* How often each range of timesteps was really drawn, in the middle of its range. */
  function drawnDots(run, overLogSnr) {
    if (!run.errors) return null;
    const { edges, drawn, log_snr } = run.errors, middle = (list) => drawn.map((_, index) => (list[index] + list[index + 1]) / 2);
    if (!overLogSnr) return { x: middle(edges), y: drawn };
    const total = edges.at(-1);
    const y = drawn.map((value, index) => (value * (edges[index + 1] - edges[index])) / total / Math.abs(log_snr[index] - log_snr[index + 1]));
    return { x: middle(log_snr), y: y.map((value) => (Number.isFinite(value) ? value : null)) };
  }

  // ---------------------------------------------------------------------------------------------------- the tables

  function scores() {
    const { rows, protocols, names } = data.scores;
    if (!rows.length) return;
    const host = section("scores", "Scores", "Scores and their protocols", "Numbers compare within one protocol only.");
    protocols.forEach((protocol, index) => {
      const own = rows.filter((row) => row.protocol === index);
      const shown = Object.keys(names).filter((name) => own.some((row) => row.values[name] !== undefined));
      const best = Object.fromEntries(shown.map((name) => {
        const found = range(own.map((row) => row.values[name]), false);
        return [name, found && own.length > 1 ? (LOWER(name) ? found[0] : HIGHER(name) ? found[1] : null) : null];
      }));
      const part = element("div", host);
      part.style.marginTop = "14px";
      element("p", part, { className: "note" }, `${protocols.length > 1 ? `Protocol ${index + 1}: ` : ""}${protocol.words}.`).style.margin = "0 0 8px";
      const made = table(part, ["run", "step", "images seen", "training time", ...shown.map(arrow)], own.map((row) => (line) => {
        const first = element("td", line);
        dotted(first, row.run);
        first.append(runs[row.run].name);
        element("td", line, {}, row.step === null ? "–" : row.step.toLocaleString("en"));
        element("td", line, {}, count(row.images));
        element("td", line, {}, duration(row.seconds));
        shown.forEach((name) => element("td", line, { className: best[name] !== null && row.values[name] === best[name] ? "best" : "" }, format(row.values[name], 4)));
        listeners.push(() => { line.hidden = !state.shown[row.run]; });
      }));
      made.dataset.scores = index;
    });
    const details = element("details", host);
    details.open = protocols.length > 1;
    element("summary", details, {}, protocols.length > 1 ? "In what the protocols differ" : "The whole protocol");
    const parts = Object.keys(protocols[0].parts);
    table(details, ["part", ...protocols.map((_, index) => (protocols.length > 1 ? `protocol ${index + 1}` : "value"))], parts.map((name) => (row) => {
      const values = protocols.map((protocol) => protocol.parts[name] ?? "–");
      if (new Set(values).size > 1) row.className = "other";
      element("th", row, { scope: "row" }, name.replaceAll("_", " "));
      values.forEach((value) => element("td", row, {}, value));
    }), "text").id = "protocols";
  }

  function configuration() {
    const alone = runs.length === 1;
    const host = section("configuration", "Options", "Options", alone ? "What differs from the defaults; all options below." : "In what the runs differ; all options below.");
    const show = (parent, options, id) => {
      const heads = ["option", "default", ...runs.map((run) => run.name)];
      const made = table(parent, heads, options.map((option) => (row) => {
        row.dataset.words = `${option.name} ${option.help}`.toLowerCase();
        element("th", row, { scope: "row", title: option.help }, option.name);
        element("td", row, { className: "same" }, option.default);
        option.values.forEach((value) => element("td", row, { className: value === option.default ? "same" : "changed" }, value));
      }), "text");
      made.id = id;
      return made;
    };
    const few = data.options.filter((option) => (alone ? option.changed : option.differs));
    if (few.length) show(host, few, "differences");
    else element("p", host, { className: "note" }, alone ? "All options have their defaults." : "All options are the same.");
    const details = element("details", host);
    element("summary", details, {}, `All ${data.options.length} options`);
    const search = element("input", element("div", details, { className: "row-of" }), { type: "search", placeholder: "Find an option", ariaLabel: "Find an option" });
    const all = show(details, data.options, "options");
    search.addEventListener("input", () => {
      for (const row of all.tBodies[0].rows) row.hidden = !row.dataset.words.includes(search.value.toLowerCase());
    });
  }

  head();
  overview();
  samples();
  curves();
  errors();
  strategies();
  scores();
  configuration();
  document.documentElement.dataset.ready = "true";
})();
