"use strict";
// The page of a dump. `data` is what fxprune/viewer/data.py wrote; nothing is fetched.

const data = JSON.parse(document.getElementById("data").textContent);
const STEPS = ["trace", "flow", "groups", "score", "select", "rewrite", "verify"];
const TABS = ["Groups", "Layers", "Stays", "Report"];
const LANE = 196, ROW = 62, WIDTH = 168, HEIGHT = 40;
const nodes = new Map(data.nodes.map((node) => [node.id, node]));
const users = new Map(data.nodes.map((node) => [node.id, []]));
for (const node of data.nodes) for (const input of node.inputs) users.get(input)?.push(node.id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const state = { step: "groups", tab: "Groups", chosen: null };
const byId = (id) => document.getElementById(id);
const number = (value) => (value ?? 0).toLocaleString("en");

// -- elements ---------------------------------------------------------------------------------------

/** An element with attributes and children; texts are texts, never HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

function drawing(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const link = (text, onclick) => make("button", { class: "link", onclick }, text);
const toNode = (id) => link(`%${id}`, () => choose("node", id));
const swatch = (index) => make("span", { class: "swatch", style: `background:${colour(index)}` });
const section = (title, ...children) => (children.length ? [make("h3", {}, title), ...children] : []);
const box = (...children) => make("div", { class: "box code" }, ...children);

/** Hues a golden angle apart, so that neighbours differ; grey for what stays. */
function colour(index) {
  const group = data.groups[index];
  if (!group || group.stays) return dark.matches ? "#4a515d" : "#d5d8de";
  const hue = Math.round((index * 137.508 + 210) % 360);
  return dark.matches ? `hsl(${hue}, 34%, 40%)` : `hsl(${hue}, 62%, 83%)`;
}

// -- the graph --------------------------------------------------------------------------------------

const reached = (step) => data.steps.some((each) => each.name === step);
const mainGroup = (node) => (node.groups && node.groups.length ? node.groups[0][0] : null);
const short = (text, length) => (text.length <= length ? text : `…${text.slice(1 - length)}`);

/** What stands below a node's name at each step. */
function subtitle(node) {
  const group = data.groups[mainGroup(node)];
  const now = node.new_shape ?? node.shape;
  const said = {
    trace: [node.kind, node.shape].filter(Boolean).join("  "),
    flow: node.unknown ? "no rule" : (node.ids || []).join("; ") || "no channels",
    groups: group ? `${group.name}  ${number(group.size)}` : "no channels that may go",
    score: group ? group.name : "",
    select: group ? `${number(group.kept ?? group.size)} of ${number(group.size)}` : "",
    rewrite: merged(node.shape, now),
  };
  return said[state.step] ?? said.rewrite;
}

/** ``[2, 64→32, 56, 56]`` of two shapes of as many dims. */
function merged(before, after) {
  const old = before.split(", "), now = after.split(", ");
  if (old.length !== now.length) return after;
  const digits = (text) => text.replace(/[^0-9]/g, "");
  return now.map((each, i) => (each === old[i] ? each : each.replace(/\d+/, `${digits(old[i])}→${digits(each)}`))).join(", ");
}

function fill(node) {
  const plain = dark.matches ? "#272d38" : "#ffffff";
  if (state.step === "trace") return plain;
  if (state.step === "flow") return node.unknown ? "#d98032" : (node.ids || []).length ? (dark.matches ? "#2c3f6b" : "#dbe6fd") : plain;
  const index = mainGroup(node);
  return index === null ? plain : colour(index);
}

function isAccented(node) {
  return ["rewrite", "verify"].includes(state.step) && Boolean(node.new_call || node.added);
}

/** The rows at which a long graph goes on in another column: where few edges cross, and so that
 * the whole is about as wide as a screen. */
function breaks() {
  const rows = Math.max(...data.nodes.map((node) => node.at[1]), 0) + 1;
  const columns = Math.round(Math.sqrt((1.5 * rows * ROW) / columnWidth()));
  if (rows < 60 || columns < 2) return [0];
  const crossing = new Array(rows + 1).fill(0);
  for (const node of data.nodes) for (const input of node.inputs) {
    for (let row = (nodes.get(input)?.at[1] ?? node.at[1]) + 1; row <= node.at[1]; row++) crossing[row]++;
  }
  const found = [0], most = rows / columns;
  while (rows - found.at(-1) > most * 1.3) {
    const from = Math.round(found.at(-1) + most * 0.75), to = Math.min(Math.round(found.at(-1) + most * 1.25), rows - 1);
    let best = from;
    for (let row = from; row <= to; row++) if (crossing[row] < crossing[best]) best = row;
    found.push(best);
  }
  return found;
}

const columnWidth = () => (Math.max(...data.nodes.map((node) => node.at[0]), 0) + 2.1) * LANE;

function elements() {
  const starts = breaks(), wide = columnWidth();
  const column = (row) => starts.findLastIndex((start) => start <= row);
  const found = data.nodes.map((node) => ({
    data: { id: node.id },
    position: { x: node.at[0] * LANE + column(node.at[1]) * wide, y: (node.at[1] - starts[column(node.at[1])]) * ROW },
  }));
  for (const node of data.nodes) {
    for (const input of new Set(node.inputs)) {
      if (!nodes.has(input)) continue;
      const from = nodes.get(input).at, rows = node.at[1] - from[1], lanes = node.at[0] - from[0];
      const far = column(from[1]) !== column(node.at[1]);
      found.push({ data: { id: `${input} ${node.id}`, source: input, target: node.id, ...bend(far ? 1 : rows, lanes) } });
    }
  }
  return found;
}

/** Edges over several rows swing out to the left, past the nodes between: twice as far as wanted,
 * as a curve goes half the way to its control point. */
function bend(rows, lanes) {
  if (rows <= 1 || lanes !== 0) return { curve: "straight", swing: 0 };
  return { curve: "unbundled-bezier", swing: Math.min(WIDTH + 30 + rows * 7, WIDTH * 2.3) };
}

function styles() {
  const ink = dark.matches ? "#e4e8ef" : "#1c2330", line = dark.matches ? "#566072" : "#aab3c1";
  const accent = dark.matches ? "#86aaff" : "#2f5fd0";
  return [
    { selector: "node", style: {
      shape: "round-rectangle", width: WIDTH, height: HEIGHT, "border-width": 1, "border-color": line,
      "background-color": (element) => fill(nodes.get(element.id())), color: ink,
      label: (element) => `${short(element.id(), 25)}\n${short(subtitle(nodes.get(element.id())), 27)}`,
      "text-wrap": "wrap", "text-valign": "center", "text-halign": "center", "font-size": 10.5,
      "line-height": 1.35, "min-zoomed-font-size": 5,
      "font-family": 'system-ui, "Segoe UI", Roboto, Arial, sans-serif' } },
    { selector: "node.accent", style: { "border-width": 2.5, "border-color": "#d98032" } },
    { selector: "node.dim", style: { opacity: 0.28 } },
    { selector: "edge", style: {
      width: 1.2, "line-color": line, "curve-style": "data(curve)", "control-point-distances": "data(swing)",
      "control-point-weights": 0.5, "target-arrow-shape": "triangle", "target-arrow-color": line,
      "arrow-scale": 0.7, "line-opacity": data.nodes.length > 300 ? 0.45 : 0.9 } },
    { selector: "edge.dim", style: { opacity: 0.12 } },
    { selector: "edge.near", style: { width: 2.2, "line-color": accent, "target-arrow-color": accent, "line-opacity": 1 } },
    { selector: "node.chosen", style: { "border-width": 3, "border-color": accent } },
  ];
}

const graph = cytoscape({
  container: byId("graph"), elements: elements(), style: styles(), layout: { name: "preset" },
  minZoom: 0.005, maxZoom: 3, autoungrabify: true, boxSelectionEnabled: false,
  hideEdgesOnViewport: data.nodes.length > 400, textureOnViewport: data.nodes.length > 400,
});
graph.on("tap", "node", (event) => choose("node", event.target.id()));
graph.on("tap", () => byId("graph").focus({ preventScroll: true }));
graph.on("tap", (event) => { if (event.target === graph) letGo(); });

/** All of a small graph; of a large one its beginning, large enough to be read. */
function openAt() {
  graph.fit(undefined, 28);
  if (graph.zoom() >= 0.62) { graph.zoom(Math.min(graph.zoom(), 1.25)); graph.center(); return; }
  const box = graph.nodes().boundingBox(), zoom = Math.max(Math.min(graph.width() / (box.w + 300), 1), 0.72);
  const left = Math.max(graph.width() / 2 - (zoom * box.w) / 2, 170 * zoom + 20);
  graph.zoom(zoom);
  graph.pan({ x: left - zoom * box.x1, y: 36 - zoom * box.y1 });
}

function redraw() {
  graph.batch(() => {
    graph.style(styles());
    graph.nodes().forEach((element) => element.toggleClass("accent", isAccented(nodes.get(element.id()))));
  });
  mark();
  drawLegend();
}

/** What is chosen stands out; of a group, all that carries its channels. */
function mark() {
  graph.batch(() => {
    graph.elements().removeClass("dim near chosen");
    if (!state.chosen) return;
    const { kind, id } = state.chosen;
    if (kind === "node") {
      const element = graph.getElementById(id);
      element.addClass("chosen");
      element.connectedEdges().addClass("near");
    } else {
      const mine = graph.nodes().filter((each) => (nodes.get(each.id()).groups || []).some(([index]) => index === id));
      graph.elements().not(mine).not(mine.edgesWith(mine)).addClass("dim");
    }
  });
}

function drawLegend() {
  const said = {
    trace: [], flow: [["#d98032", "no rule: frozen"], [dark.matches ? "#2c3f6b" : "#dbe6fd", "carries channels"]],
  };
  const groups = data.groups.some((group) => !group.stays)
    ? [[`linear-gradient(90deg, ${[0, 1, 2, 3].map(colour).join(",")})`, "a colour for each group"],
       [dark.matches ? "#4a515d" : "#d5d8de", "stays"]] : [];
  const changed = ["rewrite", "verify"].includes(state.step) ? [["#d98032", "call corrected"]] : [];
  const rows = said[state.step] ?? [...groups, ...changed];
  byId("legend").hidden = !rows.length;
  byId("legend").replaceChildren(...rows.map(([fill, text]) =>
    make("li", {}, make("span", { class: "swatch", style: `background:${fill}` }), text)));
}

function show(ids) {
  const found = graph.nodes().filter((each) => ids.includes(each.id()));
  if (!found.length) return;
  const zoom = Math.max(graph.zoom(), 0.75);
  const first = found[0].position();
  graph.zoom(zoom);
  graph.pan({ x: graph.width() / 2 - zoom * first.x, y: graph.height() * 0.42 - zoom * first.y });
}

// -- what is chosen ---------------------------------------------------------------------------------

function choose(kind, id, { move = true } = {}) {
  state.chosen = { kind, id };
  mark();
  if (move) {
    const carriers = data.nodes.filter((node) => mainGroup(node) === id).map((node) => node.id);
    const ids = kind === "node" ? [id] : carriers.slice(0, 1);
    if (kind === "group" || !isInView(id)) show(ids);
  }
  drawDetails();
  drawList();
  byId("said").textContent = kind === "node" ? `node ${id}` : `group ${data.groups[id].name}`;
}

function isInView(id) {
  const at = graph.getElementById(id).renderedPosition();
  return at && at.x > 40 && at.y > 30 && at.x < graph.width() - 40 && at.y < graph.height() - 30;
}

function letGo() {
  state.chosen = null;
  mark();
  drawDetails();
  drawList();
}

function drawDetails() {
  const target = byId("details");
  const chosen = state.chosen;
  const said = !chosen ? overview() : chosen.kind === "node" ? ofNode(nodes.get(chosen.id)) : ofGroup(chosen.id);
  target.replaceChildren(...said);
  target.scrollTop = 0;
}

function overview() {
  const step = data.steps.find((each) => each.name === state.step);
  const about = {
    trace: "The model's own code ran once on tensors without data, and every op was written down.",
    flow: "The graph ran again on channel numbers: which channel does each element belong to?",
    groups: "What must shrink together is one group. Choose one to see its members and its ties.",
    score: "Each channel of a group got a score; low ones go first. Choose a group to see them.",
    select: "What stays of every group. Choose one to see the cut.",
    rewrite: "The new graph, with narrow parameters and corrected calls (framed).",
    verify: "The new graph was compared with the original, its removed channels set to zero.",
  };
  return [
    make("h2", {}, state.step), make("p", {}, about[state.step]),
    ...(step ? section("This time", make("p", {}, step.summary)) : []),
    ...(!reached("verify") && step === data.steps.at(-1)
      ? [make("p", { class: "warning" }, "The run ended here: the error that it raised says why.")] : []),
    ...toldAt(state.step),
  ];
}

/** What is worth knowing of a step as a whole. */
function toldAt(step) {
  const changed = data.nodes.filter((node) => node.new_call || node.added).slice(0, 60);
  const unknown = data.nodes.filter((node) => node.unknown);
  const kinds = Object.entries(Object.groupBy ? Object.groupBy(data.nodes, (node) => node.kind || node.call) : {})
    .map(([kind, found]) => [kind, found.length]).sort((a, b) => b[1] - a[1]).slice(0, 24);
  const said = {
    trace: () => section("Ops", make("table", {}, ...kinds.map(([kind, count]) => make("tr", {}, make("td", { class: "code" }, kind), make("td", { class: "number" }, number(count)))))),
    flow: () => section("Without a rule", ...unknown.map((node) => make("p", {}, toNode(node.id), ` ${node.unknown}`))),
    groups: () => section("Keep equal counts", ...data.constraints.slice(0, 20).map((text) => box(text))),
    select: () => section("Gave less than asked", ...data.groups.flatMap((group, i) => (group.reason ? [make("p", {}, link(group.name, () => choose("group", i)), `: ${group.reason}`)] : [])).slice(0, 40)),
    rewrite: () => section("Corrected", ...changed.flatMap((node) => [make("p", {}, toNode(node.id)),
      ...(node.new_call ? [box(make("span", { class: "was" }, node.call)), box(node.new_call)] : []), ...(node.added || []).map((text) => box(text))])),
  };
  return said[step] ? said[step]() : [];
}

function ofNode(node) {
  const groups = (node.groups || []).map(([index, count]) =>
    make("p", {}, swatch(index), " ", link(data.groups[index].name, () => choose("group", index)),
      make("span", { class: "soft" }, `  ${number(count)} channels`)));
  const shape = node.new_shape && node.new_shape !== node.shape
    ? [box(node.shape), box(node.new_shape)] : node.shape ? [box(node.shape)] : [];
  const call = node.new_call ? [box(make("span", { class: "was" }, node.call)), box(node.new_call)] : [box(node.call)];
  return [
    make("h2", {}, `%${node.id}`),
    ...section(node.new_call ? "Call, before and after" : "Call", ...call),
    ...section(shape.length > 1 ? "Shape, before and after" : "Shape", ...shape),
    ...section("Source", ...(node.source ? [box(node.source)] : [])),
    ...section("Rule", ...(node.rule ? [box(node.rule)] : [])),
    ...(node.unknown ? [make("p", { class: "warning" }, `No rule: ${node.unknown}`)] : []),
    ...section("Channels of", ...groups),
    ...section("Channel numbers", ...(node.ids || []).map((text) => box(text))),
    ...section("Stays", ...(node.frozen || []).map((text) => make("p", {}, text))),
    ...section("New beside it", ...(node.added || []).map((text) => box(text))),
    ...section("Takes", ...listed(node.inputs)),
    ...section("Goes into", ...listed(users.get(node.id))),
  ];
}

const listed = (ids) => (ids.length ? [make("p", {}, ...ids.slice(0, 40).flatMap((id, i) => (i ? [", ", toNode(id)] : [toNode(id)])))] : []);

function ofGroup(index) {
  const group = data.groups[index];
  const roles = { out: "makes", in: "reads", through: "carries", scale: "scales", free: "holds" };
  const rows = group.members.slice(0, 300).map(([text, role, node]) =>
    make("tr", {}, make("td", { class: "code" }, nodes.has(node) ? link(text, () => choose("node", node)) : text),
      make("td", {}, roles[role] ?? role)));
  const ties = group.ties.slice(0, 100).map(([node, call, source]) =>
    box(nodes.has(node) ? toNode(node) : "", make("div", {}, call), make("div", { class: "soft" }, source)));
  const kept = group.kept === null ? "" : `${number(group.kept)} of ${number(group.size)} stay`;
  const bound = data.constraints.filter((text) => text.includes(` of ${group.name}`));
  return [
    make("h2", {}, swatch(index), group.name),
    make("p", {}, kept || `${number(group.size)} channels`, group.reason ? `: ${group.reason}` : ""),
    ...(group.stays ? section("Stays, because it", make("p", {}, group.stays),
      ...(group.stays_at ? [toNode(group.stays_at)] : []), ...(group.stays_source ? [box(group.stays_source)] : [])) : []),
    ...(group.scores && reached("score") ? section("Scores", histogram(group.scores, group)) : []),
    ...section("Channels that stay", ...(group.kept_channels && group.kept < group.size ? [box(group.kept_channels)] : [])),
    ...section(`Members (${group.members.length})`, make("table", {}, ...rows)),
    ...section("Equal counts", ...bound.map((text) => box(text))),
    ...section(`Tied at (${group.ties.length})`, ...ties),
  ];
}

/** Channels by score: those that go, those that stay, and the cut between them. */
function histogram(scores, group) {
  const W = 320, H = 110, base = 88, most = Math.max(...scores.counts, 1), step = W / scores.counts.length;
  const high = (count) => (count / most) * 72;
  const bars = scores.counts.flatMap((count, i) => {
    const gone = scores.gone ? scores.gone[i] : 0, x = i * step + 0.5, width = Math.max(step - 1, 1);
    const stays = count - gone;
    return [
      drawing("rect", { class: "goes", x, width, y: base - high(gone), height: high(gone) }),
      drawing("rect", { class: "stays", x, width, y: base - high(count), height: high(stays) }),
    ];
  });
  const texts = [
    drawing("text", { x: 0, y: 103 }, scores.low.toPrecision(3)),
    drawing("text", { x: W, y: 103, "text-anchor": "end" }, scores.high.toPrecision(3)),
  ];
  const at = scores.cut === null || scores.cut === undefined ? null
    : ((scores.cut - scores.low) / (scores.high - scores.low || 1)) * W;
  const cut = at === null ? [] : [
    drawing("line", { class: "cut", x1: at, x2: at, y1: 0, y2: base }),
    drawing("text", { x: at + (at > W * 0.7 ? -5 : 5), y: 10, "text-anchor": at > W * 0.7 ? "end" : "start" }, `cut ${scores.cut.toPrecision(3)}`),
  ];
  const told = `${group.size} scores from ${scores.low.toPrecision(3)} to ${scores.high.toPrecision(3)}`;
  return drawing("svg", { viewBox: `0 0 ${W} ${H}`, width: "100%", role: "img", "aria-label": told }, ...bars, ...texts, ...cut);
}

// -- lists ------------------------------------------------------------------------------------------

/** Draw into a place anew, with the focus where it was, by the number of the button. */
function redrawn(holder, ...children) {
  const here = [...holder.querySelectorAll("button")].indexOf(document.activeElement);
  holder.replaceChildren(...children);
  if (here >= 0) holder.querySelectorAll("button")[here]?.focus({ preventScroll: true });
}

function drawList() {
  const said = { Groups: groupRows, Layers: layerRows, Stays: stayRows, Report: reportRows }[state.tab]();
  const target = byId("list"), before = target.scrollTop;
  const rows = said.length ? said : [make("p", { class: "soft", style: "padding:8px" }, "Nothing yet at this step.")];
  redrawn(target, ...rows);
  target.scrollTop = before;
}

function row(head, count, inner, onclick, chosen) {
  return make("button", { class: "row", onclick, "aria-current": chosen ? "true" : null },
    make("div", { class: "head" }, ...head, make("span", { class: "count" }, count)), ...inner);
}

function bar(before, after, most) {
  const share = (value) => `width:${Math.max((value / most) * 100, 0.6)}%`;
  return make("div", { class: "bar" }, make("i", { style: share(before) }), make("i", { style: share(after) }));
}

const named = (text) => make("span", { class: "name", title: text }, short(text, 30));
const isChosen = (kind, id) => state.chosen && state.chosen.kind === kind && state.chosen.id === id;

function groupRows() {
  const most = Math.max(...data.groups.map((group) => group.size), 1);
  return data.groups.map((group, i) => {
    const kept = group.kept ?? group.size;
    const count = kept === group.size ? number(group.size) : `${number(group.size)} → ${number(kept)}`;
    return row([swatch(i), named(group.name)], count, [bar(group.size, kept, most)], () => choose("group", i), isChosen("group", i));
  });
}

function layerRows() {
  const most = Math.max(...data.layers.map(([, width]) => width[0]), 1);
  return data.layers.map(([name, width]) => {
    const id = [...nodes.values()].find((node) => node.call.startsWith(`self.${name}(`) || node.id === name.replaceAll(".", "_"))?.id;
    return row([named(name)], `${number(width[0])} → ${number(width[1])}`, [bar(width[0], width[1], most)],
      () => id && choose("node", id), id && isChosen("node", id));
  });
}

function stayRows() {
  const groups = data.groups.map((group, i) => [group, i]).filter(([group]) => group.stays)
    .sort(([a], [b]) => b.size - a.size)
    .map(([group, i]) => row([named(group.name)], number(group.size),
      [make("div", { class: "why" }, group.stays, group.stays_source ? ` (${group.stays_source})` : "")],
      () => choose("group", i), isChosen("group", i)));
  const unknown = data.nodes.filter((node) => node.unknown).map((node) =>
    row([named(`%${node.id}`)], "no rule", [make("div", { class: "why" }, node.unknown, ` ${node.source}`)],
      () => choose("node", node.id), isChosen("node", node.id)));
  return [...unknown, ...groups];
}

function reportRows() {
  const report = data.report;
  if (!report) return [];
  const verified = data.steps.find((each) => each.name === "verify");
  const totals = [["channels", report.channels], ["parameters", report.params], ["MACs", report.macs]].map(([name, [before, after]]) =>
    make("div", { class: "row" }, make("div", { class: "head" }, named(name), make("span", { class: "count" }, `${number(before)} → ${number(after)}`)),
      bar(before, after, before || 1)));
  const padded = (attributes, ...texts) => make("p", { style: "padding:6px 9px", ...attributes }, ...texts);
  return [
    padded({}, make("strong", {}, report.title)), padded({ class: "soft" }, report.inputs), ...totals,
    padded({}, "Verified: ", verified ? verified.summary : "no"),
    ...report.warnings.map((text) => padded({ class: "warning" }, text)),
    ...report.causes.map(([channels, where, remedy]) => padded({}, `${number(channels)} channels stay: ${where}. `, make("span", { class: "soft" }, remedy))),
  ];
}

// -- header, steps, tabs ----------------------------------------------------------------------------

function drawHeader() {
  byId("model").textContent = data.model;
  const report = data.report;
  if (!report) return;
  const share = ([before, after]) => `${number(before)} → ${number(after)} (${before ? ((after / before) * 100).toFixed(1) : 100} %)`;
  const rows = [["parameters", report.params], ["MACs", report.macs]];
  byId("totals").replaceChildren(...rows.map(([name, pair]) => make("div", {}, make("dt", {}, name), make("dd", {}, share(pair)))));
}

const timed = (seconds) => (seconds < 1 ? `${Math.max(Math.round(seconds * 1000), 1)} ms` : `${seconds.toFixed(1)} s`);

function drawSteps() {
  redrawn(byId("steps"), ...STEPS.map((name, i) => {
    const found = data.steps.find((each) => each.name === name);
    return make("button", {
      role: "tab", id: `step-${name}`, "aria-selected": String(name === state.step), disabled: found ? null : "",
      tabindex: name === state.step ? 0 : -1, title: `${name} (${i + 1})`, onclick: () => goTo(name),
    }, name, make("small", {}, found ? timed(found.seconds) : "not reached"));
  }));
  byId("summary").textContent = data.steps.find((each) => each.name === state.step)?.summary ?? "";
}

function drawTabs() {
  redrawn(byId("tabs"), ...TABS.map((name) => make("button", {
    role: "tab", "aria-selected": String(name === state.tab), tabindex: name === state.tab ? 0 : -1,
    onclick: () => { state.tab = name; drawTabs(); drawList(); },
  }, name)));
}

function goTo(step) {
  if (!reached(step)) return;
  state.step = step;
  drawSteps();
  redraw();
  drawDetails();
  drawList();
}

// -- search -----------------------------------------------------------------------------------------

const index = [
  ...data.groups.map((group, i) => ({ kind: "group", id: i, name: group.name, more: `group of ${number(group.size)}`, text: `${group.name} ${group.members.map((m) => m[0]).join(" ")}` })),
  ...data.nodes.map((node) => ({ kind: "node", id: node.id, name: `%${node.id}`, more: node.source || node.call, text: `${node.id} ${node.call} ${node.source} ${node.kind}` })),
];
for (const each of index) each.text = each.text.toLowerCase();
let hits = [], at = 0;

function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const found = words.length ? index.filter((each) => words.every((word) => each.text.includes(word))) : [];
  const rank = (each) => (each.name.toLowerCase().replace("%", "").startsWith(words[0]) ? 0 : each.name.toLowerCase().includes(words[0]) ? 1 : 2);
  hits = found.sort((a, b) => rank(a) - rank(b)).slice(0, 60);
  at = 0;
  drawFound(words.length > 0);
}

function drawFound(open) {
  const list = byId("found"), input = byId("search");
  list.hidden = !open;
  input.setAttribute("aria-expanded", String(open));
  input.setAttribute("aria-activedescendant", hits.length ? `hit-${at}` : "");
  list.replaceChildren(...(hits.length ? hits.map((each, i) => make("li", {
    role: "option", id: `hit-${i}`, "aria-selected": String(i === at), onmousedown: (event) => { event.preventDefault(); take(i); },
  }, each.kind === "group" ? swatch(each.id) : "", make("span", {}, each.name), make("span", {}, each.more)))
    : [make("li", { role: "option", "aria-selected": "false" }, "Nothing found")]));
  list.children[at]?.scrollIntoView({ block: "nearest" });
}

function take(i) {
  const hit = hits[i];
  if (!hit) return;
  drawFound(false);
  choose(hit.kind, hit.id);
  byId("graph").focus();
}

byId("search").addEventListener("input", (event) => search(event.target.value));
byId("search").addEventListener("blur", () => drawFound(false));
byId("search").addEventListener("keydown", (event) => {
  const moves = { ArrowDown: 1, ArrowUp: -1 };
  if (event.key in moves && hits.length) {
    at = (at + moves[event.key] + hits.length) % hits.length;
    drawFound(true);
  } else if (event.key === "Enter") take(at);
  else if (event.key === "Escape") { event.target.value = ""; search(""); byId("graph").focus(); }
  else return;
  event.preventDefault();
  event.stopPropagation();
});

// -- keyboard ---------------------------------------------------------------------------------------

/** The next node along the graph, or beside. */
function neighbour(key) {
  if (!state.chosen || state.chosen.kind !== "node") return data.nodes[0]?.id;
  const node = nodes.get(state.chosen.id);
  if (key === "ArrowDown") return users.get(node.id)[0];
  if (key === "ArrowUp") return node.inputs[0];
  const side = key === "ArrowRight" ? 1 : -1;
  const beside = data.nodes.filter((each) => (each.at[0] - node.at[0]) * side > 0)
    .sort((a, b) => Math.hypot(a.at[0] - node.at[0], a.at[1] - node.at[1]) - Math.hypot(b.at[0] - node.at[0], b.at[1] - node.at[1]));
  return beside[0]?.id;
}

const zoomBy = (factor) => graph.zoom({ level: graph.zoom() * factor, renderedPosition: { x: graph.width() / 2, y: graph.height() / 2 } });
const GRAPH_KEYS = { "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8), 0: () => { graph.resize(); graph.fit(undefined, 28); }, Enter: () => byId("details").focus() };

byId("graph").addEventListener("keydown", (event) => {
  if (event.key.startsWith("Arrow")) {
    const next = neighbour(event.key);
    if (next) choose("node", next);
  } else if (event.key in GRAPH_KEYS) GRAPH_KEYS[event.key]();
  else return;
  event.preventDefault();
});

/** Arrow keys go through the buttons of a list or a row of tabs; tabs are taken at once. */
function roving(holder, back, forth, taken) {
  holder.addEventListener("keydown", (event) => {
    const step = { [forth]: 1, [back]: -1 }[event.key];
    const buttons = [...holder.querySelectorAll("button:not(:disabled)")];
    const here = buttons.indexOf(document.activeElement);
    if (!step || here < 0) return;
    const next = (here + step + buttons.length) % buttons.length;
    buttons[next].focus();
    if (taken) { buttons[next].click(); holder.querySelectorAll("button:not(:disabled)")[next]?.focus(); }
    event.preventDefault();
  });
}
roving(byId("steps"), "ArrowLeft", "ArrowRight", true);
roving(byId("tabs"), "ArrowLeft", "ArrowRight", true);
roving(byId("list"), "ArrowUp", "ArrowDown", false);

document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { byId("search").focus(); byId("search").select(); event.preventDefault(); }
  else if (event.key === "Escape") letGo();
  else if (event.key in GRAPH_KEYS && event.key !== "Enter" && event.target !== byId("graph")) GRAPH_KEYS[event.key]();
  else if (/^[1-7]$/.test(event.key)) goTo(STEPS[event.key - 1]);
});
byId("nearer").addEventListener("click", GRAPH_KEYS["+"]);
byId("further").addEventListener("click", GRAPH_KEYS["-"]);
byId("fit").addEventListener("click", GRAPH_KEYS[0]);
dark.addEventListener("change", () => { redraw(); drawList(); drawDetails(); });

// -- start ------------------------------------------------------------------------------------------

if (!reached("groups")) state.step = data.steps.at(-1)?.name ?? "trace";
drawHeader();
drawTabs();
openAt();
goTo(state.step);
document.documentElement.dataset.ready = "yes";
