// Package plot draws measurements as SVG: series over an axis, and bars. It is
// no general plotter: axes are linear and begin at 0.
package plot
