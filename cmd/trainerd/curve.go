package main

import (
	"fmt"
	"io"
	"strings"
)

// curve draws held-out accuracy over steps, and the reward beside it.
func curve(w io.Writer, points []point) {
	const width = 50
	fmt.Fprintf(w, "step   accuracy on held-out alerts\n")
	for _, p := range points {
		n := int(p.Mean.Accuracy*width + 0.5)
		fmt.Fprintf(w, "%4d  |%s%s| %5.1f %%  reward %6.3f\n", p.Step, strings.Repeat("█", n), strings.Repeat(" ", width-n), 100*p.Mean.Accuracy, p.Mean.Reward)
	}
}
