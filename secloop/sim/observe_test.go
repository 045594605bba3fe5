package sim

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

// TestEveryIncidentIsSeen observes every scenario with several seeds: the sensor
// raises something about the target each time, and the same seed the same alerts.
func TestEveryIncidentIsSeen(t *testing.T) {
	for _, sc := range scenario.All() {
		a := alert(t, sc.Name, 1)
		for seed := range uint64(5) {
			got, err := Field{}.Observe(context.Background(), a, seed)
			if err != nil {
				t.Fatal(err)
			}
			about := 0
			for _, al := range got {
				if al.Host == a.Target {
					about++
				}
			}
			if about == 0 {
				t.Errorf("%s, seed %d: nothing about %s among %d alerts", sc.Name, seed, a.Target, len(got))
			}
			again, err := Field{}.Observe(context.Background(), a, seed)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(got, again); d != "" {
				t.Errorf("%s, seed %d: first -, again +\n%s", sc.Name, seed, d)
			}
			if seed == 0 {
				for _, s := range sensor.Summarize(got, 6) {
					t.Logf("%s: %s", sc.Name, s)
				}
			}
		}
	}
}
