package bench

import (
	"context"
	"strings"
	"testing"
)

func TestGrowth(t *testing.T) {
	var all []GrowthResult
	o := GrowthOptions{Shape: "smoke", Layers: 1, Prompt: 16, Completion: 4, GroupSize: 4, Repeats: 1}
	err := Growth(context.Background(), openCPU(t), o, func(r GrowthResult) error { all = append(all, r); return nil })
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != len(GrowthAxes)*len(axisFactors) {
		t.Fatalf("%d points", len(all))
	}
	for i, r := range all {
		if r.StepSeconds <= 0 || r.Processor < 0 || r.StateBytes != all[0].StateBytes || r.Layers != 1 || r.Tokens != r.Groups*(r.Prompt+r.GroupSize*r.Completion) {
			t.Errorf("%+v", r)
		}
		if i%len(axisFactors) > 0 && (r.Tokens <= all[i-1].Tokens || r.ScratchBytes <= all[i-1].ScratchBytes || *r.point() != 2**all[i-1].point()) {
			t.Errorf("%+v follows %+v", r, all[i-1])
		}
	}
	for _, axis := range GrowthAxes {
		if p := string(GrowthPlot(axis, all)); strings.Count(p, "<polyline") != 4 || !strings.Contains(p, "1 layers on cpu") {
			t.Errorf("plot of %s:\n%s", axis, p)
		}
	}
	o.GroupSize = 3
	if err := Growth(context.Background(), openCPU(t), o, nil); err == nil {
		t.Error("a quarter of 3 was measured")
	}
}
