package trainer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"trainerd/internal/fault"
	"trainerd/kernels"
)

// codeLost is the code of an error after which a device can only be closed
// (CUDA calls it sticky): every later call fails with it too.
const codeLost = "device_lost"

// errReload is what work gets whose model was on a device that was lost, without
// its own doing: the job loads its newest snapshot and repeats its log.
var errReload = &fault.Error{Kind: fault.Unavailable, Code: "device_reopened", RetryAfter: 5 * time.Second,
	Msg: "the device was lost and is opened again; the job goes on from its newest snapshot and its log"}

// lostDevice reports whether any error in the tree says that the device is lost.
func lostDevice(err error) bool {
	if err == nil {
		return false
	}
	if f, ok := err.(*fault.Error); ok && f.Code == codeLost {
		return true
	}
	switch u := err.(type) {
	case interface{ Unwrap() []error }:
		for _, e := range u.Unwrap() {
			if lostDevice(e) {
				return true
			}
		}
	case interface{ Unwrap() error }:
		return lostDevice(u.Unwrap())
	}
	return false
}

// examine looks at how a piece of a job's work ended. What a failed piece left
// on the device is waited for here, so that no other job meets its error. When
// the device is lost, the error says what that means for the job: it is its own
// doing (code device_lost, and the job fails), or it has to load again
// (errReload). own says that the job's own work ran, not a transfer. Called on
// the device's goroutine.
func (m *Manager) examine(j *Job, err error, own bool) error {
	if err == nil {
		if own {
			m.proven, m.suspect = true, ""
		}
		return nil
	}
	cause := err
	if !lostDevice(cause) {
		m.mu.Lock()
		dev := m.dev
		m.mu.Unlock()
		if dev == nil {
			return err
		}
		if serr := dev.Sync(); lostDevice(serr) {
			cause = errors.Join(err, serr)
		} else {
			return err
		}
	}
	blamed := own && (m.proven || m.suspect == j.ID)
	m.suspect = ""
	if own && !blamed {
		m.suspect = j.ID
	}
	m.lose(cause)
	if blamed {
		return fault.New(fault.Internal, codeLost, "the device was lost in this job's work: %w", cause)
	}
	return errReload
}

// lose gives up a lost device and everything on it. Jobs that had a model there
// are told to load again; finished ones only lose the model that they kept for
// requests. Called on the device's goroutine.
func (m *Manager) lose(cause error) {
	m.log.Error("device lost", "err", cause)
	m.proven = false
	m.mu.Lock()
	dev := m.dev
	m.dev = nil
	m.mu.Unlock()
	for _, j := range m.Jobs() {
		if j.model == nil {
			continue
		}
		j.model.Abandon()
		j.model, j.engine = nil, nil
		j.loaded.Store(false)
		m.home.left(j.ID)
		j.mu.Lock()
		if j.state.Final() {
			m.home.drop(j.ID)
		} else {
			j.lost = true
			j.setState(Loading)
		}
		j.mu.Unlock()
		j.poke()
	}
	if dev == nil {
		return
	}
	m.losses.Add(1)
	if err := dev.Close(); err != nil {
		m.log.Warn("close the lost device", "err", err)
	}
}

// reopen opens the device that was lost. Called on the device's goroutine.
func (m *Manager) reopen() (kernels.Device, error) {
	dev, err := m.tryOpen()
	m.mu.Lock()
	if err != nil {
		m.unopened++
		m.unopenedBy = err
		tries := m.unopened
		m.mu.Unlock()
		switch tries {
		case 1:
			m.spawn(false, m.keepOpening)
		case reopenTries:
			m.log.Error("the device cannot be opened again in this process: /healthz answers 503 until it can, so that a supervisor starts the server anew; jobs go on from their state then", "tries", tries, "err", err)
		}
		return nil, err
	}
	m.dev = dev
	m.unopened, m.unopenedBy = 0, nil
	m.mu.Unlock()
	m.log.Info("device opened again", "device", dev.Info().Name)
	return dev, nil
}

func (m *Manager) tryOpen() (kernels.Device, error) {
	if m.opts.Reopen == nil {
		return nil, fault.New(fault.Unavailable, codeUnopened, "the device is lost, and this server cannot open it again")
	}
	dev, err := m.opts.Reopen()
	if err != nil {
		return nil, &fault.Error{Kind: fault.Unavailable, Code: codeUnopened, Msg: "open the lost device again", RetryAfter: 5 * time.Second, Err: err}
	}
	return dev, nil
}

// reopenTries is how many failures in a row to open the lost device are taken to
// mean that this process will not do it: after some errors CUDA wants a new one.
const reopenTries = 5

// laneDevice is the executor's account of work that is no job's.
const laneDevice JobID = "device"

// keepOpening tries to open the lost device again, whether or not a job asks for
// it, until it is open or the manager closes: who watches /readyz sends nothing meanwhile.
func (m *Manager) keepOpening() {
	defer m.exec.Forget(laneDevice)
	for pause := retryFirst; ; pause = min(2*pause, retryMost) {
		select {
		case <-time.After(pause):
		case <-m.closed:
			return
		}
		err := m.exec.Do(context.Background(), lane{laneDevice, laneRequest}, func() error {
			_, err := m.device()
			return err
		})
		if err == nil || errors.Is(err, errClosed) {
			return
		}
	}
}

// deviceFault is how often in a row the lost device could not be opened, and why;
// 0 and nil where it is open or nobody has tried yet.
func (m *Manager) deviceFault() (tries int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.unopened, m.unopenedBy
}

// Alive says whether this process can go on: nil, or why it has to be started
// anew. All that was accepted is on disk, and jobs go on from there.
func (m *Manager) Alive() error {
	if tries, err := m.deviceFault(); tries >= reopenTries {
		return &fault.Error{Kind: fault.Unavailable, Code: codeUnopened, Msg: fmt.Sprintf("the device could not be opened again %d times: start the server anew", tries), Err: err}
	}
	return nil
}

// codeUnopened is the code of a device that cannot be opened again, now or ever.
const codeUnopened = "device_unavailable"

// Device returns the device in use, which the caller closes once Close returned;
// nil when it was lost and not opened again.
func (m *Manager) Device() kernels.Device {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dev
}

// isLost says that the job has to load again.
func (j *Job) isLost() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.lost
}

// unsettle closes the job's intake and waits for its publication under way, so
// that the queue can be rebuilt from snapshot and log as after a restart.
func (j *Job) unsettle(ctx context.Context) error {
	j.intake.Lock() // whoever writes to the log has done so when this returns
	j.mu.Lock()
	if !j.state.Final() {
		j.fed = false
		j.setState(Loading)
	}
	j.lost = false
	j.mu.Unlock()
	j.intake.Unlock()
	if err := j.awaitFlight(ctx); err != nil {
		return err
	}
	select {
	case <-j.m.closed:
		return errClosed
	default:
		return nil
	}
}
