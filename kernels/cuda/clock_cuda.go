//go:build cuda

package cuda

import "gorgonia.org/cu"

// eventWatch is a stopwatch of CUDA events. They are kept for the next profile;
// the context's end frees them.
type eventWatch struct {
	stream cu.Stream
	events []cu.Event
	n      int
}

func (c *card) stopwatch() stopwatch { return &eventWatch{stream: c.stream} }

func (w *eventWatch) start() { w.n = 0 }

func (w *eventWatch) stamp() error {
	if w.n == len(w.events) {
		e, err := cu.MakeEvent(cu.DefaultEvent)
		if err != nil {
			return err
		}
		w.events = append(w.events, e)
	}
	w.n++
	return w.events[w.n-1].Record(w.stream)
}

func (w *eventWatch) read() ([]float64, float64, error) {
	if err := w.events[w.n-1].Synchronize(); err != nil {
		return nil, 0, err
	}
	between := make([]float64, w.n-1)
	for i := range between {
		ms, err := w.events[i].Elapsed(w.events[i+1])
		if err != nil {
			return nil, 0, err
		}
		between[i] = ms / 1e3
	}
	ms, err := w.events[0].Elapsed(w.events[w.n-1])
	return between, ms / 1e3, err
}
