package access

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/labstack/echo/v4"

	"trainerd/internal/fault"
)

// Options are what a Guard is made of. Zero values mean: no tokens asked for,
// no audit log, no limits.
type Options struct {
	Tokens *Tokens
	Audit  *Audit
	Logger *slog.Logger // nil: none
	// Rate bounds the requests a second of one token; twice as many may come at
	// once. 0: no limit.
	Rate int
	// Requests bounds the requests that are answered at once, streams and long
	// polls included. 0: no limit.
	Requests int
	// TokenRequests bounds those of one token. 0: no limit.
	TokenRequests int
	Now           func() time.Time // nil: time.Now
}

// Guard stands before every guarded route.
type Guard struct {
	opts  Options
	rates *rates
	wrong *rates // failed authentication by address
	slots *shares
}

// wrongRate bounds how many refused tokens a second one address gets told about
// and written into the audit log.
const wrongRate, wrongBurst = 10, 100

// New returns a guard.
func New(o Options) *Guard {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Guard{opts: o, rates: newRates(float64(o.Rate), float64(2*o.Rate)), wrong: newRates(wrongRate, wrongBurst),
		slots: newShares(o.Requests, o.TokenRequests)}
}

type identityKey struct{}

// TokenID returns the id of the token that a request came with, "" without tokens.
func TokenID(ctx context.Context) string {
	id, _ := ctx.Value(identityKey{}).(string)
	return id
}

// Middleware checks, in this order: who it is (401), whether the route is theirs
// (403), how often they came (429), and how many there are (429). Who may not be
// here learns nothing about what is here: refusals depend on the token and the
// table alone, never on whether a job exists.
func (g *Guard) Middleware(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		r := c.Request()
		now := g.opts.Now()
		e := Entry{
			Time: now.UTC(), RequestID: c.Response().Header().Get("X-Request-Id"), Remote: host(r.RemoteAddr), Subject: subject(r),
			Route: r.Method + " " + c.Path(), Job: clip(c.Param("job")), BytesIn: r.ContentLength,
		}
		tok, why, err := g.admit(c, now)
		if err == nil {
			if why, err = g.slots.take(tok.ID); err == nil {
				defer g.slots.give(tok.ID)
			}
		}
		e.Token, e.Refused = tok.ID, why
		if why != flood { // the refusals before it are in the log
			e.Status = http.StatusInternalServerError // if the handler panics
			defer func() { g.audit(e, now) }()
		}
		if err == nil {
			c.SetRequest(r.WithContext(context.WithValue(r.Context(), identityKey{}, tok.ID)))
			err = next(c)
		}
		if err != nil {
			c.Error(err) // answers; the status is known from here on
		}
		e.Status, e.BytesOut = c.Response().Status, c.Response().Size
		return nil
	}
}

// flood is why a refusal is not written down.
const flood = "too many wrong tokens"

// admit says who a request is from and whether they may make it.
func (g *Guard) admit(c echo.Context, now time.Time) (tok Token, why string, err error) {
	r := c.Request()
	if g.opts.Tokens == nil {
		return tok, "", nil
	}
	tok, why, err = g.opts.Tokens.find(bearer(r), now)
	if err != nil {
		g.opts.Logger.ErrorContext(r.Context(), "nobody is let in: the tokens cannot be read", "err", err)
		return tok, why, &fault.Error{Kind: fault.Unavailable, Code: "tokens_unavailable", RetryAfter: 5 * time.Second, Msg: "the server cannot read its tokens"}
	}
	if why != "" {
		if wait, ok := g.wrong.take(host(r.RemoteAddr), now); !ok {
			return tok, flood, overRate(wait)
		}
		c.Response().Header().Set("WWW-Authenticate", `Bearer realm="trainerd"`)
		// One text for every reason: what is wrong with a token is nobody's business.
		return tok, why, &fault.Error{Kind: fault.Unauthenticated, Code: "unauthenticated", Msg: "a valid bearer token is required"}
	}
	if wait, ok := g.rates.take(tok.ID, now); !ok {
		return tok, "rate", overRate(wait)
	}
	if !tok.allows(r.Method+" "+c.Path(), c.Param("job")) {
		return tok, "role or job", &fault.Error{Kind: fault.Denied, Code: "denied", Msg: "the token does not allow this"}
	}
	return tok, "", nil
}

func overRate(wait time.Duration) error {
	return &fault.Error{Kind: fault.Busy, Code: "rate_limited", RetryAfter: max(wait, time.Millisecond), Msg: "requests come faster than allowed"}
}

// bearer reads the Authorization header. Two of them are none.
func bearer(r *http.Request) string {
	values := r.Header.Values("Authorization")
	if len(values) != 1 {
		return ""
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

func (g *Guard) audit(e Entry, began time.Time) {
	if g.opts.Audit == nil {
		return
	}
	e.Seconds = g.opts.Now().Sub(began).Seconds()
	if err := g.opts.Audit.Write(e); err != nil {
		g.opts.Logger.Error("audit log", "request_id", e.RequestID, "err", err)
	}
}

// subject is the name in a client certificate that was verified.
func subject(r *http.Request) string {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return ""
	}
	return clip(r.TLS.VerifiedChains[0][0].Subject.String())
}

func host(addr string) string {
	if h, _, err := net.SplitHostPort(addr); err == nil {
		return h
	}
	return addr
}

// clip bounds what a stranger writes into the log.
func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "..."
	}
	return s
}
