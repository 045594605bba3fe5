package trainer

// JobStats are a job's gauges, and its totals since the process began.
type JobStats struct {
	ID           JobID
	State        State
	Step         int64
	PolicyStep   int64
	Queue        Queue
	Counts       Counts
	PlanBytes    int64 // device bytes; 0 while the model is off the device
	Loaded       bool
	Publication  Publication
	DelaySeconds float64 // that steps were put off for open groups
	Failing      string  // code of what goes wrong at present, "" for nothing
	Resident     bool

	SwapsIn, SwapsOut int64
	SwapSeconds       float64

	Steps, Published, SampledTokens, ScoredTokens, TrainedTokens int64
	StepSeconds, PublishSeconds                                  float64
	PublishedBytes                                               int64
}

// Stats are what a monitoring system wants to know of a manager.
type Stats struct {
	Jobs        []JobStats // oldest first
	DeviceQueue int        // pieces of device work that wait
	DiskFailing bool       // the data directory takes no writes at present
	DiskErrors  int64      // writes to it that failed
	DeviceLost  int64      // times that the device was lost
	PinFailures int64      // memory of captures that the device refused to write to itself
	SwapBytes   int64      // host memory of models off the device
}

// Stats returns the numbers of now.
func (m *Manager) Stats() Stats {
	s := Stats{DeviceQueue: m.exec.Depth(), DeviceLost: m.losses.Load(), PinFailures: m.pinFailures.Load(), SwapBytes: m.home.swapped()}
	n, disk := m.disk.state()
	s.DiskFailing, s.DiskErrors = disk != nil, n
	for _, j := range m.Jobs() {
		st := j.Status()
		js := JobStats{ID: j.ID, State: st.State, Step: st.Step, PolicyStep: st.PolicyStep, Queue: st.Queue, Counts: st.Counts, Publication: st.Publication, Loaded: j.loaded.Load()}
		js.PlanBytes, js.Resident = m.home.resident(j.ID)
		if e := j.failing(); e != nil {
			js.Failing = e.Code
		}
		j.mu.Lock()
		c := j.counts
		j.mu.Unlock()
		js.Steps, js.Published, js.SampledTokens, js.ScoredTokens, js.TrainedTokens = c.Steps, c.Published, c.SampledTokens, c.ScoredTokens, c.TrainedTokens
		js.SwapsIn, js.SwapsOut, js.SwapSeconds = c.SwapsIn, c.SwapsOut, c.SwapSeconds
		js.StepSeconds, js.PublishSeconds, js.PublishedBytes, js.DelaySeconds = c.StepSeconds, c.PublishSeconds, c.PublishedBytes, c.DelaySeconds
		s.Jobs = append(s.Jobs, js)
	}
	return s
}
