// Render SVG pictures. Reads {"size": 128, "svgs": [...]} from standard input; writes [base64 of a PNG, ...].
const { Resvg } = require("@resvg/resvg-js");
const { size, svgs } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const options = { fitTo: { mode: "width", value: size }, background: "white" };
const pngs = svgs.map((svg) => new Resvg(svg, options).render().asPng().toString("base64"));
process.stdout.write(JSON.stringify(pngs));
