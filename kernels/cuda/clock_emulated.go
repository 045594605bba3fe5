//go:build cudaemu

package cuda

import "time"

// clockWatch is a stopwatch for a driver that does everything at once.
type clockWatch struct{ at []time.Time }

func (e *emulated) stopwatch() stopwatch { return &clockWatch{} }

func (w *clockWatch) start()       { w.at = w.at[:0] }
func (w *clockWatch) stamp() error { w.at = append(w.at, time.Now()); return nil }

func (w *clockWatch) read() ([]float64, float64, error) {
	n := len(w.at) - 1
	between := make([]float64, n)
	for i := range between {
		between[i] = w.at[i+1].Sub(w.at[i]).Seconds()
	}
	return between, w.at[n].Sub(w.at[0]).Seconds(), nil
}
