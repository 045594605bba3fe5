package sensor

import (
	"cmp"
	"slices"
	"time"
)

// Alert is one thing that a sensor noticed. Source is the address outside that
// has to do with it, also where the connection was opened from inside; for a
// flood with forged sources it is their /24 network. Target is the blue address.
type Alert struct {
	At         time.Duration `json:"at"` // since the capture began, in nanoseconds
	Signature  int           `json:"signature"`
	Name       string        `json:"name"`
	Category   string        `json:"category"`
	Severity   int           `json:"severity"` // 1 high, 2 medium, 3 low
	Proto      string        `json:"proto"`
	Source     string        `json:"source"`
	Target     string        `json:"target"`
	SourcePort int           `json:"source_port"`
	TargetPort int           `json:"target_port"`
	Host       string        `json:"host"` // blue host of Target, "" when it is none
}

// Sort orders alerts by time, then by everything else, so that the same alerts always come in the same order.
func Sort(alerts []Alert) {
	slices.SortFunc(alerts, func(a, b Alert) int {
		return cmp.Or(cmp.Compare(a.At, b.At), cmp.Compare(a.Signature, b.Signature), cmp.Compare(a.Source, b.Source), cmp.Compare(a.Target, b.Target),
			cmp.Compare(a.SourcePort, b.SourcePort), cmp.Compare(a.TargetPort, b.TargetPort), cmp.Compare(a.Name, b.Name))
	})
}
