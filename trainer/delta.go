package trainer

import (
	"context"
	"io"
	"path"
	"time"

	"trainerd/internal/fault"
	"trainerd/storage"
)

// At most maxDeltas are computed at once: each reads two checkpoints and keeps a core busy.
const (
	maxDeltas  = 2
	deltaRetry = 2 * time.Second
)

// Delta writes what turns the Hugging Face directory of one checkpoint into that
// of another (storage/delta). Few run at once, since each reads both; when they
// do, the call is refused as Busy before anything is written.
func (j *Job) Delta(ctx context.Context, out io.Writer, from, to storage.Manifest) error {
	select {
	case j.m.deltas <- struct{}{}:
		defer func() { <-j.m.deltas }()
	default:
		return &fault.Error{Kind: fault.Busy, Code: "too_many_deltas", RetryAfter: deltaRetry, Msg: "as many deltas are being computed as may be at once"}
	}
	j.mu.Lock()
	values := 2 // bytes of BF16 and F16
	if j.rec.DType == "F32" {
		values = 4
	}
	j.mu.Unlock()
	word := func(name string) int {
		if path.Ext(name) == ".safetensors" {
			return values
		}
		return 1
	}
	return storeFault("write a delta", j.m.ckpts.WriteDelta(ctx, out, from, to, prefixHF, word))
}
