export { default as createScatterplot, checkSupport } from "regl-scatterplot";
