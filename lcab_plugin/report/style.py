"""The look of the page. Colours hold 3:1 against their ground and are told apart by the colour-blind (after
Okabe and Ito); light or dark as the reader's system is."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--ground:#fff;--raised:#f6f7f8;--ink:#1c1f23;--soft:#555b63;--rule:#d5d9de;
--link:#0059a8;--tint:#56b4e9;--good:#00664a;--bad:#a83a00;--c0:#0072b2;--c1:#d55e00;--c2:#00855f;
--c3:#b0518a;--c4:#2f8fc4;--c5:#a87400;--c6:#5b5fc7;--c7:#6b6f75;--seen:#0072b2;--some:#8fc1df}
@media(prefers-color-scheme:dark){:root{--ground:#16181c;--raised:#1f2227;--ink:#e6e8eb;--soft:#a6adb6;
--rule:#3a3f47;--link:#7fc1f5;--tint:#1f6fa3;--good:#4fd0a5;--bad:#ff9a62;--c0:#4aa8e0;--c1:#f0813a;
--c2:#2fc79a;--c3:#dd8fbb;--c4:#8fd0f7;--c5:#e6a91f;--c6:#9da0f5;--c7:#a9afb7;--seen:#56b4e9;--some:#33627c}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
header,main,footer{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:28px}h1{font-size:27px;line-height:1.2;margin:0 0 4px}
h2{font-size:21px;margin:44px 0 6px;padding-top:14px;border-top:1px solid var(--rule)}
h3{font-size:16px;margin:26px 0 6px}p{margin:6px 0 10px;max-width:86ch}
a{color:var(--link)}.soft,.caption,footer{color:var(--soft)}.caption{margin:20px 0 4px}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:12px 0 0;padding:0}
.skip{position:absolute;left:-999px}.skip:focus{left:8px;top:8px;background:var(--ground);padding:6px}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.scroll{overflow-x:auto;margin:14px 0 8px;max-width:100%}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:0 0 6px;white-space:nowrap}
th,td{padding:4px 10px;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;
overflow-wrap:break-word;max-width:34em}
thead th{background:var(--raised);color:var(--soft);font-weight:600;vertical-align:bottom;
}
tbody th{font-weight:500}
.wide table{width:max-content}.wide tbody th{white-space:nowrap}
th.n,td.n{text-align:right}td.n{white-space:nowrap}
td[style]{background:color-mix(in srgb,var(--tint) var(--t),transparent)}
td.best{font-weight:700}.aside{color:var(--soft);font-weight:400}td.pass{color:var(--good)}td.fail{color:var(--bad);font-weight:700}
.notes{font-size:13px;color:var(--soft);margin:0 0 12px;padding-left:26px;max-width:110ch}
.notes li:target{background:var(--raised);color:var(--ink)}
details{margin:8px 0}summary{cursor:pointer;color:var(--link)}
details table caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.panels{display:flex;flex-wrap:wrap;gap:14px 20px;margin:8px 0 16px}
figure{margin:0;width:min-content}figcaption{font-size:13.5px;font-weight:600;max-width:340px}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;list-style:none;margin:4px 0;padding:0;font-size:13.5px}
.swatch{vertical-align:-2px}svg text{font-size:11.5px;fill:var(--ink)}svg .label{fill:var(--soft)}
.mid{text-anchor:middle}.end{text-anchor:end}.grid{stroke:var(--rule);stroke-width:.7}
.axis,.tick{stroke:var(--soft)}.limit{stroke:var(--bad);stroke-dasharray:5 4}
.across{stroke:var(--ink);stroke-width:2}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.band{opacity:.18}.frame{fill:none;stroke:var(--rule)}.ground{fill:var(--raised)}
.seen{fill:var(--seen)}.some{fill:var(--some)}
footer{margin-top:48px;padding-bottom:40px;font-size:13px}
@media print{.scroll{overflow:visible}nav{display:none}}
""" + "".join(f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}" for i in range(8))
