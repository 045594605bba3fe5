package trainer

import "testing"

// TestRoom holds the accounting of device memory: promises count until a job
// gives them up, whatever the device says is free.
func TestRoom(t *testing.T) {
	loaded, loading := &Job{}, &Job{}
	loaded.loaded.Store(true)
	m := &Manager{budget: 100, jobs: map[JobID]*Job{"loaded": loaded, "loading": loading},
		reserved: map[JobID]int64{"loaded": 30, "loading": 20, "new": 99}}
	for _, tc := range []struct{ free, want int64 }{
		{100, 50}, // a job's pages that were never touched look free
		{70, 50},  // 30 allocated, 20 promised
		{40, 20},  // somebody else took 30
		{10, 0},
	} {
		if got := m.room("new", tc.free); got != tc.want {
			t.Errorf("room with %d free: %d, expected %d", tc.free, got, tc.want)
		}
	}
	m.release("loading")
	if got := m.room("new", 70); got != 70 {
		t.Errorf("room after a release: %d, expected 70", got)
	}
}
