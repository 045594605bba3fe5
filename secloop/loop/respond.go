package loop

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"trainerd/internal/fault"
	"trainerd/secloop"
	"trainerd/secloop/scenario"
	"trainerd/secloop/sensor"
)

// Target is where strategies are really applied.
type Target interface {
	Name() string
	// Apply carries out all actions of a decision, or none.
	Apply(ctx context.Context, decision string, actions []scenario.Action) error
}

// Responder answers live alerts with strategies: POST /v1/alerts. Without a
// target every answer is a dry run.
type Responder struct {
	Agent  *Agent // Codec, Form and Sampler are used
	Most   int    // summaries in a prompt
	Target Target // nil: dry run
	Token  string // that callers must show; "": none, for loopback only

	AllowHarmful bool          // apply tools that stop a service with the attack, too
	PerHour      int           // most decisions that are applied within an hour
	Waiting      int           // requests that may wait for the sampler; more are refused
	Timeout      time.Duration // of one answer
	Dir          string        // decisions.jsonl is kept here; "": nowhere

	once    sync.Once
	turn    chan struct{} // one request samples at a time
	queue   chan struct{}
	mu      sync.Mutex
	applied []time.Time
	count   uint64
}

// Decision is the answer to alerts.
type Decision struct {
	ID         string           `json:"id"`
	Time       time.Time        `json:"time"`
	PolicyStep int64            `json:"policy_step"` // -1: the endpoint does not say
	Summaries  []sensor.Summary `json:"summaries"`
	Completion string           `json:"completion"`
	Calls      []Checked        `json:"calls"`  // empty when the completion is no strategy
	Status     string           `json:"status"` // dry_run, applied, refused or failed
	Reason     string           `json:"reason,omitempty"`
	Target     string           `json:"target,omitempty"`
}

// Checked is one call of a strategy and what it would change.
type Checked struct {
	secloop.Call
	Harmful bool              `json:"harmful,omitempty"`
	Effects []scenario.Effect `json:"effects,omitempty"`
	Error   string            `json:"error,omitempty"`
}

// Bounds of one request.
const (
	maxAlertBytes = 4 << 20
	maxAlerts     = 10_000
	maxText       = 200 // of a name in an alert
)

// alertDocument is the webhook's own JSON: alerts, or summaries somebody made already.
type alertDocument struct {
	Alerts    []sensor.Alert   `json:"alerts"`
	Summaries []sensor.Summary `json:"summaries"`
}

// ServeHTTP implements http.Handler.
func (r *Responder) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	r.once.Do(func() {
		r.turn, r.queue = make(chan struct{}, 1), make(chan struct{}, max(r.Waiting, 1))
	})
	switch {
	case q.URL.Path == "/healthz" && q.Method == http.MethodGet:
		io.WriteString(w, "ok\n")
		return
	case q.URL.Path != "/v1/alerts":
		refuse(w, http.StatusNotFound, "not_found", "expected POST /v1/alerts or GET /healthz")
		return
	case q.Method != http.MethodPost:
		w.Header().Set("Allow", http.MethodPost)
		refuse(w, http.StatusMethodNotAllowed, "method_not_allowed", "expected POST")
		return
	case !r.admits(q):
		w.Header().Set("WWW-Authenticate", "Bearer")
		refuse(w, http.StatusUnauthorized, "unauthenticated", "expected a bearer token")
		return
	}
	summaries, err := readAlerts(http.MaxBytesReader(w, q.Body, maxAlertBytes), q.Header.Get("Content-Type"), r.Most)
	if err != nil {
		refuseFault(w, err)
		return
	}
	select {
	case r.queue <- struct{}{}:
		defer func() { <-r.queue }()
	default:
		w.Header().Set("Retry-After", "1")
		refuse(w, http.StatusTooManyRequests, "busy", "too many requests wait for a strategy")
		return
	}
	ctx, cancel := context.WithTimeout(q.Context(), r.Timeout)
	defer cancel()
	select {
	case r.turn <- struct{}{}:
		defer func() { <-r.turn }()
	case <-ctx.Done():
		refuse(w, http.StatusServiceUnavailable, "timeout", "no strategy in time")
		return
	}
	d, err := r.Decide(ctx, summaries)
	if err != nil {
		refuseFault(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(d) // a caller who has gone is told nothing
}

func (r *Responder) admits(q *http.Request) bool {
	if r.Token == "" {
		return true
	}
	got, ok := strings.CutPrefix(q.Header.Get("Authorization"), "Bearer ")
	a, b := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(r.Token))
	return ok && subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// readAlerts reads the body of a request and summarises it.
func readAlerts(body io.Reader, contentType string, most int) ([]sensor.Summary, error) {
	kind, _, _ := mime.ParseMediaType(contentType)
	var alerts []sensor.Alert
	switch kind {
	case "application/json":
		var doc alertDocument
		raw, err := io.ReadAll(body)
		if err != nil {
			return nil, tooLarge(err)
		}
		dec := json.NewDecoder(bytes.NewReader(raw))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&doc); err != nil {
			return nil, fault.New(fault.Malformed, "malformed_json", "read alerts: %v", err)
		}
		if _, err := dec.Token(); err != io.EOF {
			return nil, fault.New(fault.Malformed, "malformed_json", "read alerts: text after the object")
		}
		if (len(doc.Alerts) == 0) == (len(doc.Summaries) == 0) {
			return nil, fault.New(fault.Invalid, "invalid_request", "read alerts: expected either alerts or summaries")
		}
		if len(doc.Summaries) > 0 {
			if len(doc.Summaries) > most {
				return nil, fault.New(fault.TooLarge, "too_many", "read alerts: %d summaries, expected at most %d", len(doc.Summaries), most)
			}
			for i, s := range doc.Summaries {
				if err := plain(i, s.Type, s.Source, s.Target, s.Risk); err != nil {
					return nil, err
				}
			}
			return doc.Summaries, nil
		}
		alerts = doc.Alerts
	case "application/x-ndjson", "application/jsonlines":
		var err error
		if alerts, err = sensor.ReadEVE(body); err != nil {
			return nil, tooLarge(err)
		}
		if len(alerts) == 0 {
			return nil, fault.New(fault.Invalid, "invalid_request", "read EVE: no alerts among the events")
		}
	default:
		return nil, fault.New(fault.Invalid, "unsupported_media_type", "content type %.60q, expected application/json or application/x-ndjson (Suricata EVE)", contentType)
	}
	if len(alerts) > maxAlerts {
		return nil, fault.New(fault.TooLarge, "too_many", "read alerts: %d, expected at most %d", len(alerts), maxAlerts)
	}
	for i, a := range alerts {
		if err := plain(i, a.Name, a.Source, a.Target, a.Host); err != nil {
			return nil, err
		}
	}
	return sensor.Summarize(alerts, most), nil
}

// plain refuses text that is no short line: what an attacker can write into an
// alert ends up in a prompt.
func plain(i int, texts ...string) error {
	for _, t := range texts {
		if len(t) > maxText || strings.ContainsFunc(t, func(c rune) bool { return c < ' ' || c == 0x7f || c == 0xFFFD }) {
			return &fault.Error{Kind: fault.Invalid, Code: "invalid_request", Msg: "read alerts",
				Fields: []fault.Field{{Name: "alerts", Row: i, Got: fmt.Sprintf("%.40q", t), Expected: fmt.Sprintf("at most %d bytes of printable text", maxText)}}}
		}
	}
	return nil
}

func tooLarge(err error) error {
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return fault.New(fault.TooLarge, "body_too_large", "read alerts: more than %d bytes", large.Limit)
	}
	return err
}

// Decide asks the policy about summaries, checks its strategy and, where there
// is a target and nothing speaks against it, has it applied.
func (r *Responder) Decide(ctx context.Context, summaries []sensor.Summary) (Decision, error) {
	_, ids, err := r.Agent.Prompt(Incident{Summaries: summaries})
	if err != nil {
		return Decision{}, err
	}
	r.mu.Lock()
	r.count++
	seed := r.count
	r.mu.Unlock()
	now := time.Now().UTC()
	completions, step, err := r.Agent.Sampler.Sample(ctx, [][]int32{ids}, 1, seed)
	if err != nil {
		return Decision{}, fmt.Errorf("sample a strategy: %w", err)
	}
	if len(completions) != 1 || len(completions[0]) != 1 {
		return Decision{}, fmt.Errorf("sample a strategy: expected one completion")
	}
	d := Decision{ID: fmt.Sprintf("%s-%d", now.Format("20060102T150405.000000Z"), seed), Time: now, PolicyStep: step, Summaries: summaries,
		Completion: r.Agent.Form.Opening() + r.Agent.Codec.Decode(completions[0][0].Tokens, true), Status: "dry_run"}
	var actions []scenario.Action
	d.Calls, actions, d.Reason = check(d.Completion, r.AllowHarmful)
	switch {
	case d.Reason != "":
		d.Status = "refused"
	case r.Target != nil:
		d.Target = r.Target.Name()
		if !r.mayApply(now) {
			d.Status, d.Reason = "refused", fmt.Sprintf("%d decisions were applied within the last hour", r.PerHour)
			break
		}
		if err := r.Target.Apply(ctx, d.ID, actions); err != nil {
			d.Status, d.Reason = "failed", err.Error()
			break
		}
		d.Status = "applied"
	}
	if r.Dir != "" {
		r.mu.Lock()
		defer r.mu.Unlock()
		if err := appendLines(filepath.Join(r.Dir, "decisions.jsonl"), d); err != nil {
			return d, err
		}
	}
	return d, nil
}

// check parses a completion; reason says why none of it may be applied.
func check(completion string, harmful bool) (calls []Checked, actions []scenario.Action, reason string) {
	s, err := secloop.ParseStrategy(completion)
	if err != nil {
		return nil, nil, err.Error()
	}
	for i, c := range s {
		k := Checked{Call: c}
		a, err := scenario.ParseCall(c)
		if err != nil {
			k.Error = err.Error()
			reason = fmt.Sprintf("call %d is refused: %v", i, err)
		}
		if t, ok := scenario.ToolByName(c.Tool); ok && t.Harmful {
			if k.Harmful = true; !harmful {
				reason = fmt.Sprintf("call %d: %s stops a service with the attack", i, c.Tool)
			}
		}
		k.Effects = a.Effects
		calls, actions = append(calls, k), append(actions, a)
	}
	return calls, actions, reason
}

// mayApply counts applied decisions against the hourly bound.
func (r *Responder) mayApply(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.applied) > 0 && now.Sub(r.applied[0]) > time.Hour {
		r.applied = r.applied[1:]
	}
	if len(r.applied) >= r.PerHour {
		return false
	}
	r.applied = append(r.applied, now)
	return true
}

// WebTarget applies decisions by posting them to an enforcement point:
// {"decision": ID, "actions": [...]}; any status but 200 has not applied it.
type WebTarget struct {
	name string
	e    endpoint
}

// NewWebTarget checks the address of an enforcement point. Nothing is repeated:
// whether a decision that was not answered has been applied is not known.
func NewWebTarget(name, url, key string, timeout time.Duration) (*WebTarget, error) {
	e, err := newEndpoint("target", url, key, timeout, 0, 64<<10)
	if err != nil {
		return nil, err
	}
	return &WebTarget{name, e}, nil
}

// Name implements Target.
func (t *WebTarget) Name() string { return t.name }

// Apply implements Target.
func (t *WebTarget) Apply(ctx context.Context, decision string, actions []scenario.Action) error {
	_, err := t.e.post(ctx, "", map[string]any{"decision": decision, "actions": actions}, &json.RawMessage{})
	return err
}

func refuse(w http.ResponseWriter, status int, code, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"status": status, "title": http.StatusText(status), "code": code, "detail": detail})
}

// refuseFault answers with what an error says, if it is about the request.
func refuseFault(w http.ResponseWriter, err error) {
	var f *fault.Error
	if errors.As(err, &f) {
		switch f.Kind {
		case fault.Malformed:
			refuse(w, http.StatusBadRequest, f.Code, f.Error())
			return
		case fault.Invalid:
			refuse(w, http.StatusUnprocessableEntity, f.Code, f.Error())
			return
		case fault.TooLarge:
			refuse(w, http.StatusRequestEntityTooLarge, f.Code, f.Error())
			return
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		refuse(w, http.StatusServiceUnavailable, "timeout", "no strategy in time")
		return
	}
	refuse(w, http.StatusBadGateway, "policy_unavailable", "the policy did not answer")
}
