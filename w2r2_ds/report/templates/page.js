"use strict";
// Draw the figures of the page with plotly, in the colours of the page; 3D views only when they come into view, because
// a browser allows a few WebGL contexts at a time.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const drawn = [];

  // Layout values that depend on the light or dark mode, for all axes that the figure has.
  function colors(figure) {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": value("--soft"), "font.size": 11,
      "hoverlabel.bgcolor": value("--card"), "hoverlabel.font.color": value("--text"),
    };
    const is3d = figure.data.some((trace) => trace.type === "scatter3d");
    for (const axis of is3d ? ["scene.xaxis", "scene.yaxis", "scene.zaxis"] : ["xaxis", "yaxis"]) {
      layout[axis + ".gridcolor"] = layout[axis + ".zerolinecolor"] = layout[axis + ".linecolor"] = value("--line");
    }
    return layout;
  }

  function draw(div) {
    const figure = figures[div.dataset.figure];
    figure.layout.template = {};
    figure.layout.autosize = true;
    if (div.clientWidth < 480 && figure.layout.height > 340) figure.layout.height = 340;
    const config = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: Boolean(div.dataset.lazy) };
    drawn.push([div, figure]);
    Plotly.newPlot(div, figure.data, figure.layout, config).then(() => Plotly.relayout(div, colors(figure)));
  }

  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        observer.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "200px" });
  for (const div of document.querySelectorAll("[data-figure]")) {
    if (div.dataset.lazy) observer.observe(div);
    else draw(div);
  }
  dark.addEventListener("change", () => drawn.forEach(([div, figure]) => Plotly.relayout(div, colors(figure))));
})();
