package arrowio

import (
	"io"

	"trainerd/rollout"
)

// ContentType is the media type of an Arrow IPC stream.
const ContentType = "application/vnd.apache.arrow.stream"

// Decode reads one IPC stream (plain, LZ4 or ZSTD buffers) into a batch. Every
// error is a fault that names column and row; a limit that does not hold is
// found before memory is allocated for what exceeds it. It never panics.
func Decode(r io.Reader, s rollout.Schema, l rollout.Limits) (*rollout.Batch, error) {
	panic("not built yet")
}

// Encode writes a batch as one IPC stream. Codec is "", "lz4" or "zstd".
func Encode(w io.Writer, b *rollout.Batch, codec string) error { panic("not built yet") }

// ScoreRow is one row of the logprobs endpoint.
type ScoreRow struct {
	Prompt, Completion []int32
	LogProbs, Entropy  []float32 // nil on input, len(Completion) on output
}

// DecodeScores reads rows with prompt_tokens and completion_tokens (and, in an
// answer, logprobs and entropy). Other columns are refused by name.
func DecodeScores(r io.Reader, l rollout.Limits) ([]ScoreRow, error) { panic("not built yet") }

// EncodeScores writes rows with columns prompt_tokens, completion_tokens, logprobs, entropy.
func EncodeScores(w io.Writer, rows []ScoreRow) error { panic("not built yet") }

// EncodeMetrics writes one row per step: column "step" (int64), then one
// nullable float64 column per name that occurs, sorted.
func EncodeMetrics(w io.Writer, steps []int64, metrics []map[string]float64) error {
	panic("not built yet")
}
