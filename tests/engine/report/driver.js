// Operates the report's controls like a reader, and appends the curves shown to the page as JSON.
{
const report = { errors: window.faults };
setTimeout(finish, 8000);
const readAll = () => charts.filter((chart) => chart.u).map((chart) => ({
  title: chart.spec.title,
  range: [chart.u.scales.x.min, chart.u.scales.x.max],
  curves: chart.lines.map((line) => {
    const x = chart.u.data[0], y = chart.u.data[line.drawnBy];
    const last = y.findLastIndex((v) => v !== null && v !== undefined);
    const [px, py] = [chart.u.valToPos(x[last], "x", true), chart.u.valToPos(y[last], "y", true)];
    const { ctx } = chart.u, { data } = ctx.getImageData(px - 3, py - 3, 6, 6);
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(color(`--k${line.curve.color}`).slice(i, i + 2), 16));
    let drawn = false;
    for (let i = 0; i < data.length; i += 4)
      drawn ||= data[i + 3] > 100 && Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 90;
    return { run: line.curve.run, table: line.curve.table, field: line.curve.field, x: x[last], y: y[last], drawn };
  }),
}));
const button = (label) => [...document.querySelectorAll("button")].find((b) => b.textContent === label);
const later = (then) => setTimeout(then, 300);
later(() => {
  report.tokens = readAll();
  button("steps").click();
  later(() => {
    report.steps = readAll();
    const { over } = charts[0].u, box = over.getBoundingClientRect();
    const mouse = (type, share, target = over) => target.dispatchEvent(new MouseEvent(type, {
      bubbles: true, button: 0, movementX: 9, clientX: box.left + share * box.width, clientY: box.top + 50, view: window }));
    mouse("mouseenter", 0.25); mouse("mousemove", 0.25); mouse("mousedown", 0.25);
    mouse("mousemove", 0.5); mouse("mousemove", 0.75);
    later(() => mouse("mouseup", 0.75, document));
    setTimeout(() => {
      report.zoomed = readAll();
      report.wholeIsOffered = !document.getElementById("whole").hidden;
      button("Whole range").click();
      button("log").click();
      later(() => {
        report.whole = readAll();
        button("run-b").click();
        later(() => { report.hidden = readAll(); finish(); });
      });
    }, 900);
  });
});
function finish() {
  if (document.getElementById("driven")) return;
  const out = document.createElement("pre");
  out.id = "driven";
  out.textContent = JSON.stringify(report);
  document.body.append(out);
}
}
