// Draws the charts of the page with Plotly, which the page carries compressed. Colours of text and grid come from page.css, so that they
// follow the colour scheme without drawing again.
"use strict";

const DASHES = ["solid", "dash", "dot"];
const PRINTED = { width: 340, height: 220 }; // pixels; two columns on a page
const STEPS = { title: { text: "step", font: { size: 12 }, standoff: 4 }, tickformat: ",d", nticks: 6 };

function element(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

// Plotly reads a few HTML tags and entities in names.
function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

function traces(chart, colours) {
  return chart.series.flatMap((series, i) => {
    const palette = colours[chart.palette];
    const colour = series.run === null ? palette[i % palette.length] : colours.runs[series.run % colours.runs.length];
    const dash = series.run === null ? DASHES[Math.floor(i / palette.length) % DASHES.length] : series.dash;
    const mode = series.x.length === 1 ? "markers" : "lines";
    if (chart.kind === "shares") {
      return [{ x: series.x, y: series.y, name: plain(series.name), stackgroup: "all", mode: "lines", line: { width: 0, color: colour }, fillcolor: colour, hovertemplate: "%{y:.1%}" }];
    }
    const raw = { x: series.x, y: series.y, mode: "lines", line: { color: colour, width: 1, dash }, opacity: 0.28, hoverinfo: "skip" };
    const smooth = {
      x: series.x, y: series.smooth, customdata: series.y, name: plain(series.name), mode,
      line: { color: colour, width: 2, dash }, marker: { color: colour, size: 7 },
      hovertemplate: series.smooth.some((y, k) => y !== series.y[k]) ? "%{y:.4~g}  (this step %{customdata:.4~g})" : "%{y:.4~g}",
    };
    return [raw, smooth];
  });
}

// Plotly gives curves that are one constant the range ±1, whatever the constant.
function rangeOfConstant(chart) {
  const values = chart.series.flatMap((series) => series.y).filter((y) => y !== null);
  const value = values[0];
  return value && values.every((y) => y === value) ? { range: [Math.min(0, 2 * value), Math.max(0, 2 * value)] } : {};
}

function layout(chart) {
  const fixedrange = matchMedia("(pointer: coarse)").matches; // a finger that scrolls must not zoom
  const y = chart.kind === "shares" ? { range: [0, 1], tickformat: ".0%" } : chart.log ? { type: "log", dtick: 1, exponentformat: "power" } : { exponentformat: "power", minexponent: 4, ...rangeOfConstant(chart) };
  return {
    margin: { l: 52, r: 10, t: 8, b: 40 }, showlegend: false, hovermode: "x unified",
    hoverlabel: { namelength: 24, font: { size: 12 } },
    paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { family: "inherit", size: 11 },
    xaxis: { ...STEPS, fixedrange, zeroline: false },
    yaxis: { fixedrange, zeroline: false, automargin: true, nticks: 6, ...y },
  };
}

async function draw() {
  await loadPlotly();
  const charts = element("charts");
  const colours = element("colours");
  const plots = [...document.querySelectorAll(".plot")];
  for (const plot of plots) {
    const chart = charts[Number(plot.dataset.chart)];
    await Plotly.newPlot(plot, traces(chart, colours), layout(chart), { displayModeBar: false, responsive: true });
  }
  addEventListener("beforeprint", () => plots.forEach((plot) => Plotly.relayout(plot, { autosize: false, ...PRINTED })));
  addEventListener("afterprint", () => plots.forEach((plot) => Plotly.relayout(plot, { autosize: true, width: null, height: null })));
  document.documentElement.dataset.drawn = String(plots.length);
}

if (document.querySelector(".plot")) {
  draw().catch((error) => {
    document.getElementById("no-charts").hidden = false;
    console.error(error);
  });
} else {
  document.documentElement.dataset.drawn = "0";
}
