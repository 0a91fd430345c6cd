/** The types of what the page uses of htm-preact.js. */

export type Node = unknown;
export function html(strings: TemplateStringsArray, ...values: any[]): any;
export function render(tree: any, place: Element): void;
export function useState<T>(first: T | (() => T)): [T, (next: T | ((now: T) => T)) => void];
export function useReducer<S, A>(reduce: (state: S, action: A) => S, first: S): [S, (action: A) => void];
export function useEffect(run: () => void | (() => void) | undefined, needs?: readonly unknown[]): void;
export function useLayoutEffect(run: () => void | (() => void) | undefined, needs?: readonly unknown[]): void;
export function useRef<T>(first: T): { current: T };
export function useMemo<T>(make: () => T, needs: readonly unknown[]): T;
export function useCallback<T>(callback: T, needs: readonly unknown[]): T;
