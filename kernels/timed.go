package kernels

import (
	"errors"
	"time"

	"gorgonia.org/tensor"
)

// Timed is a device whose operations are done when they return (the CPU's),
// with the processor's clock around each call. It is wrapped around a device
// for a measurement; a device that is not wrapped pays nothing.
type Timed struct {
	Device
	now     func() time.Time
	each    bool
	running bool
	profile Profile
	start   time.Time
	last    time.Time // end of the operation before
}

// NewTimed wraps a device. It implements Profiler, and Scratcher as dev does.
func NewTimed(dev Device) *Timed { return &Timed{Device: dev, now: time.Now} }

// StartProfile implements Profiler.
func (t *Timed) StartProfile(each bool) {
	t.profile, t.each, t.running = Profile{}, each, true
	t.start = t.now()
	t.last = t.start
}

// StopProfile implements Profiler.
func (t *Timed) StopProfile() (Profile, error) {
	if !t.running {
		return Profile{}, errors.New("stop profile: none was started")
	}
	end := t.now()
	t.running = false
	t.profile.Gaps += end.Sub(t.last).Seconds()
	t.profile.Span = end.Sub(t.start).Seconds()
	return t.profile, t.Device.Sync()
}

func (t *Timed) time(operation string, run func()) {
	if !t.running || !t.each {
		run()
		return
	}
	from := t.now()
	run()
	to := t.now()
	t.profile.Gaps += from.Sub(t.last).Seconds()
	t.profile.Add(operation, to.Sub(from).Seconds())
	t.last = to
}

// The operations of Device, under the names that PhaseOf files.

func (t *Timed) Upload(dst Buffer, src *tensor.Dense) {
	t.time("upload", func() { t.Device.Upload(dst, src) })
}

func (t *Timed) Download(dst *tensor.Dense, src Buffer) (err error) {
	t.time("download", func() { err = t.Device.Download(dst, src) })
	return err
}

func (t *Timed) Layout(a Arena, segments []Segment) (l Layout) {
	t.time("layout", func() { l = t.Device.Layout(a, segments) })
	return l
}

func (t *Timed) Scatter(a Arena, x ScatterIndex) (s Scatter) {
	t.time("scatter", func() { s = t.Device.Scatter(a, x) })
	return s
}

func (t *Timed) Zero(dst Buffer) { t.time("zero", func() { t.Device.Zero(dst) }) }

func (t *Timed) Copy(dst, src Buffer) { t.time("copy", func() { t.Device.Copy(dst, src) }) }

func (t *Timed) Lerp(dst, src Buffer, alpha float32) {
	t.time("lerp", func() { t.Device.Lerp(dst, src, alpha) })
}

func (t *Timed) Gather(out, table, rows Buffer, d int) {
	t.time("gather", func() { t.Device.Gather(out, table, rows, d) })
}

func (t *Timed) ScatterAdd(dst, src Buffer, s Scatter, d int, accumulate bool) {
	t.time("scatter add", func() { t.Device.ScatterAdd(dst, src, s, d, accumulate) })
}

func (t *Timed) Gemm(g Gemm) { t.time("gemm", func() { t.Device.Gemm(g) }) }

func (t *Timed) BiasBackward(db, dy Buffer, m, n int, accumulate bool) {
	t.time("bias backward", func() { t.Device.BiasBackward(db, dy, m, n, accumulate) })
}

func (t *Timed) RMSNorm(x Norm) { t.time("rmsnorm", func() { t.Device.RMSNorm(x) }) }

func (t *Timed) RMSNormBackward(x NormBackward) {
	t.time("rmsnorm backward", func() { t.Device.RMSNormBackward(x) })
}

func (t *Timed) Rope(x Rope) { t.time("rope", func() { t.Device.Rope(x) }) }

func (t *Timed) RopeBackward(x RopeBackward) {
	t.time("rope backward", func() { t.Device.RopeBackward(x) })
}

func (t *Timed) Attention(x Attention) { t.time("attention", func() { t.Device.Attention(x) }) }

func (t *Timed) AttentionBackward(x AttentionBackward) {
	t.time("attention backward", func() { t.Device.AttentionBackward(x) })
}

func (t *Timed) SwiGLU(out, gu Buffer, n, f int) {
	t.time("swiglu", func() { t.Device.SwiGLU(out, gu, n, f) })
}

func (t *Timed) SwiGLUBackward(dgu, dout, gu Buffer, n, f int) {
	t.time("swiglu backward", func() { t.Device.SwiGLUBackward(dgu, dout, gu, n, f) })
}

func (t *Timed) LogProb(h Head) { t.time("log-prob", func() { t.Device.LogProb(h) }) }

func (t *Timed) LogProbBackward(h Head, g HeadGrad) {
	t.time("log-prob backward", func() { t.Device.LogProbBackward(h, g) })
}

func (t *Timed) Sample(x Draw) { t.time("sample", func() { t.Device.Sample(x) }) }

func (t *Timed) Advantages(a Advantages) {
	t.time("advantages", func() { t.Device.Advantages(a) })
}

func (t *Timed) SumSquares(out, x Buffer) {
	t.time("sum of squares", func() { t.Device.SumSquares(out, x) })
}

func (t *Timed) ClipCoef(coef, sumsq Buffer, scale, maxNorm float32) {
	t.time("clip coefficient", func() { t.Device.ClipCoef(coef, sumsq, scale, maxNorm) })
}

func (t *Timed) AdamW(x AdamW) { t.time("adamw", func() { t.Device.AdamW(x) }) }

func (t *Timed) AddGrad(x AddGrad) { t.time("add gradient", func() { t.Device.AddGrad(x) }) }

// What a Planner asks; a device that does not say needs none.

func (t *Timed) AttentionScratch(n, h, kv, hd int, backward bool) int64 {
	return t.scratch(func(s Scratcher) int64 { return s.AttentionScratch(n, h, kv, hd, backward) })
}

func (t *Timed) HeadScratch(n, d, v int, backward bool) int64 {
	return t.scratch(func(s Scratcher) int64 { return s.HeadScratch(n, d, v, backward) })
}

func (t *Timed) DrawScratch(n, d, v int) int64 {
	return t.scratch(func(s Scratcher) int64 { return s.DrawScratch(n, d, v) })
}

func (t *Timed) LayoutScratch(segments, n int) int64 {
	return t.scratch(func(s Scratcher) int64 { return s.LayoutScratch(segments, n) })
}

func (t *Timed) scratch(of func(Scratcher) int64) int64 {
	if s, ok := t.Device.(Scratcher); ok {
		return of(s)
	}
	return 0
}

var (
	_ Device    = (*Timed)(nil)
	_ Profiler  = (*Timed)(nil)
	_ Scratcher = (*Timed)(nil)
)
