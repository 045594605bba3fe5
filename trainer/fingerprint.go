package trainer

import (
	"time"

	"trainerd/kernels"
)

// fingerprint is what the bits of a job's next step depend on besides its state,
// its groups and its seed.
type fingerprint struct {
	Engine string `json:"engine"` // version of trainerd
	kernels.Fingerprint
}

// fingerprintOf asks a device.
func (m *Manager) fingerprintOf(dev kernels.Device) *fingerprint {
	return &fingerprint{Engine: m.engine(), Fingerprint: kernels.FingerprintOf(dev)}
}

// engine is the version that manifests name.
func (m *Manager) engine() string {
	if m.opts.Version == "" {
		return "trainerd"
	}
	return m.opts.Version
}

// since lists what differs from an earlier fingerprint.
func (f *fingerprint) since(was *fingerprint) []kernels.Difference {
	out := f.Fingerprint.Since(was.Fingerprint)
	if f.Engine != was.Engine {
		out = append(out, kernels.Difference{Name: "engine", Was: was.Engine, Is: f.Engine})
	}
	return out
}

// Fingerprint is what the bits of a job's steps depend on besides its state, its
// groups and its seed, as the API and manifests show it: the choices of
// algorithms by their number and digest.
type Fingerprint struct {
	Engine        string `json:"engine"`
	Device        string `json:"device"`
	Card          string `json:"card,omitempty"`
	Instructions  string `json:"instructions,omitempty"`
	Driver        string `json:"driver,omitempty"`
	DriverRelease string `json:"driver_release,omitempty"`
	CublasLt      string `json:"cublaslt,omitempty"`
	Algorithms    string `json:"algorithms,omitempty"`
	Attention     string `json:"attention,omitempty"`
	Choices       int    `json:"choices,omitempty"`
	ChoicesSHA256 string `json:"choices_sha256,omitempty"`
}

func (f *fingerprint) shown() *Fingerprint {
	if f == nil {
		return nil
	}
	return &Fingerprint{Engine: f.Engine, Device: f.Device, Card: f.Card, Instructions: f.Instructions, Driver: f.Driver, DriverRelease: f.DriverRelease,
		CublasLt: f.CublasLt, Algorithms: f.Algorithms, Attention: f.Attention, Choices: len(f.Choices), ChoicesSHA256: f.ChoicesSHA256()}
}

// extra is what a manifest says of it: strings, whose order in JSON is the same
// before and after the manifest was read, since its digest is of its bytes. The
// engine is a member of its own there.
func (f *fingerprint) extra() map[string]any {
	out := map[string]any{}
	for name, v := range map[string]string{
		"device": f.Device, "card": f.Card, "instructions": f.Instructions, "driver": f.Driver, "driver_release": f.DriverRelease,
		"cublaslt": f.CublasLt, "algorithms": f.Algorithms, "attention": f.Attention, "choices_sha256": f.ChoicesSHA256(),
	} {
		if v != "" {
			out[name] = v
		}
	}
	return map[string]any{extraFingerprint: out}
}

// extraFingerprint is the member of a manifest's extra.
const extraFingerprint = "fingerprint"

// FingerprintChange says from when on a job was computed by something else.
type FingerprintChange struct {
	Time    time.Time            `json:"time"`
	After   int64                `json:"after_step"` // steps up to it were computed as before; later ones, repeated or new, were not
	Changes []kernels.Difference `json:"changes"`
	More    int                  `json:"more,omitempty"` // that are not listed
}

const (
	// changesKept bounds the changes that a job's record keeps: the newest.
	changesKept = 16
	// differencesKept bounds what one of them lists.
	differencesKept = 32
)

// recognise compares what the job is about to be computed by with what its record
// says, and writes a change down, so that who finds other bits can tell why. step is that
// of the weights as they were loaded. A record from before there were
// fingerprints takes this one. Called on the device's goroutine.
func (j *Job) recognise(dev kernels.Device, step int64) error {
	is := j.m.fingerprintOf(dev)
	j.mu.Lock()
	defer j.mu.Unlock()
	rec := j.rec
	rec.Fingerprint = is
	if was := j.rec.Fingerprint; was != nil {
		if changes := is.since(was); len(changes) > 0 {
			c := FingerprintChange{Time: time.Now().UTC(), After: step, Changes: changes}
			if c.More = max(0, len(changes)-differencesKept); c.More > 0 {
				c.Changes = changes[:differencesKept]
			}
			all := append(rec.FingerprintChanges[:len(rec.FingerprintChanges):len(rec.FingerprintChanges)], c)
			rec.FingerprintChanges = all[max(0, len(all)-changesKept):]
			j.m.log.Warn("the job is computed by something else than before: bits may differ from an uninterrupted run", "job", j.ID, "after_step", step, "changes", c.Changes, "more", c.More)
		}
	}
	if err := j.m.db.putJob(rec, nil); err != nil {
		return j.m.disk.fault("records_unavailable", "record what the job is computed by", err)
	}
	j.rec = rec
	return nil
}

// print is what the job's record says.
func (j *Job) print() *fingerprint {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.rec.Fingerprint
}

// refresh returns the fingerprint to be recorded with a step: algorithms may have
// been chosen in it. Called on the device's goroutine.
func (j *Job) refresh(was *fingerprint) *fingerprint {
	dev := j.m.Device()
	if dev == nil {
		return was
	}
	if is := j.m.fingerprintOf(dev); was == nil || len(is.Choices) != len(was.Choices) {
		return is
	}
	return was
}
