//go:build field && linux

package field

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
	"trainerd/secloop/sim"
)

// TestSensorsAgree holds the sensor on packets and the sensor on pipes
// together: for each scenario the same signatures between the same addresses,
// and each as often.
func TestSensorsAgree(t *testing.T) {
	first := uint64(time.Now().UnixNano())
	t.Logf("seeds from %d", first)
	f := open(t, Options{Parallel: 4})
	for i, sc := range scenario.All() {
		t.Run(sc.Name, func(t *testing.T) {
			t.Parallel()
			a, seed := alertFor(sc, i), first+uint64(i)
			want, err := sim.Field{}.Observe(context.Background(), a, seed)
			if err != nil {
				t.Fatal(err)
			}
			got, err := f.Observe(context.Background(), a, seed)
			if err != nil {
				t.Fatal(err)
			}
			if len(want) == 0 {
				t.Error("the simulator's sensor saw nothing")
			}
			if d := cmp.Diff(tally(want), tally(got)); d != "" {
				t.Errorf("%s: simulator -, namespaces +\n%s", a.Key(), d)
			}
		})
	}
}

// tally counts alerts by signature, source, target and host.
func tally(alerts []sensor.Alert) []string {
	counts := map[string]int{}
	for _, a := range alerts {
		counts[fmt.Sprintf("%d %s: %s to %s (%s), severity %d", a.Signature, a.Name, a.Source, a.Target, a.Host, a.Severity)]++
	}
	var out []string
	for k, n := range counts {
		out = append(out, fmt.Sprintf("%s: %d", k, n))
	}
	slices.Sort(out)
	return out
}
